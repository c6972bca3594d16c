"""Take a finished run into the repository: its records, and its weights in half precision with what that changes.

    python results/publish.py RUN_DIRECTORY

Writes results/<recipe>-seed<k>/ and cifar_lib/weights/<recipe>.safetensors with its line in SHA256SUMS.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs without an installation

from cifar_lib.checkpoint import write_atomically
from cifar_lib.data import REAL, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.evaluate import calibration_error, fit_temperature, predict, summarize
from cifar_lib.hardware import choose_device
from cifar_lib.model import SHIPPED, ResNet, load_model, save_model

RECORDS = ("config.json", "environment.json", "history.csv", "timing.csv")


def publish(run: Path) -> dict:
    """Returns what is written as metrics.json: the run's own, and under `shipped` what the weights file scores."""
    if not (run / "metrics.json").is_file():
        raise InputError(f"publish: expected a finished run, found no metrics.json in {run}: train it to its end")
    metrics = json.loads((run / "metrics.json").read_text())
    if metrics["data"] != REAL:
        raise InputError(f"publish: expected a run on {REAL}, got one on {metrics['data']}")
    _, test = load_cifar10()
    device = choose_device()
    model, info = load_model(run / "model.safetensors")

    def logits(network: ResNet, tta: str = "none") -> Tensor:
        return predict(network.to(device), test.images, info["mean"], info["std"], tta=tta)

    whole = logits(model)
    info["temperature"] = round(fit_temperature(whole, test.labels), 4)
    weights = SHIPPED.with_name(f"{metrics['recipe']}.safetensors")
    save_model(weights, model, info, half=True)
    halved, _ = load_model(weights)
    plain = logits(halved)
    changed = int((whole.argmax(1) != plain.argmax(1)).sum())
    shipped = {"bytes": weights.stat().st_size, "predictions_changed_by_half_precision": changed}
    for tta, values in (("none", plain), ("flip", logits(halved, "flip"))):
        score = summarize(values, test.labels)
        shipped[f"tta_{tta}"] = {name: score[name] for name in ("accuracy", "interval", "n", "calibration_error")}
    shipped["temperature"] = info["temperature"]
    shipped["calibration_error_after_temperature"] = cross_fitted_error(plain, test.labels)
    metrics["shipped"] = shipped

    folder = Path(__file__).parent / f"{metrics['recipe']}-seed{metrics['seed']}"
    folder.mkdir(exist_ok=True)
    for name in RECORDS:
        shutil.copyfile(run / name, folder / name)
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    files = sorted(weights.parent.glob("*.safetensors"))
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    write_atomically(weights.parent / "SHA256SUMS", sums.encode())
    return metrics


def cross_fitted_error(logits: Tensor, labels: Tensor) -> float:
    """The calibration error when each half of the images is scaled by the temperature of the other one."""
    halves = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(2)
    scaled = logits.clone()
    for fitted, measured in (halves, halves[::-1]):
        scaled[measured] /= fit_temperature(logits[fitted], labels[fitted])
    return calibration_error(scaled, labels)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        print(json.dumps(publish(Path(sys.argv[1]))["shipped"], indent=2))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
