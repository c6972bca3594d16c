"""A search for the hyperparameters of the report's Table 1: its space, and what a trial does."""

import warnings
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pandas as pd
from optuna.exceptions import TrialPruned
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FixedTrial, Trial
from tqdm import tqdm

from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import resolve, split
from cifar_lib.hardware import choose_device, prepare
from cifar_lib.recipes import TrainConfig
from cifar_lib.study import Objective, load, open_study
from cifar_lib.train import State, Step, epoch_plan, train_one_epoch

# A trial of minutes on two cores: what differs from the recipe. Warm-up is a sixth of the epochs,
# as in the report.
SHORT = {
    "schedule": "cosine",
    "epochs": 6,
    "warmup_epochs": 1,
    "half_size_epochs": 5,
    "train_size": 4000,
    "validation_size": 1000,
    "watch_test": False,
    "policy.ops": "none",
    "policy.erasing": 0.0,
}
# The report's network, and others that the same five million parameters buy.
SHAPES = {
    "3,4,3 of 66,132,264": ((3, 4, 3), (66, 132, 264)),
    "2,2,2 of 85,170,340": ((2, 2, 2), (85, 170, 340)),
    "2,2,4 of 63,126,252": ((2, 2, 4), (63, 126, 252)),
    "5,6,5 of 50,100,200": ((5, 6, 5), (50, 100, 200)),
}


def suggest(trial: Trial, base: TrainConfig) -> TrainConfig:
    """`base` with the rows of Table 1 as the trial has them."""
    blocks, channels = SHAPES[trial.suggest_categorical("shape", list(SHAPES))]
    return replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 0.01, 0.4, log=True),
        momentum=trial.suggest_float("momentum", 0.8, 0.98),
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 2e-3, log=True),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        warmup_epochs=trial.suggest_int("warmup_epochs", 0, max(1, base.epochs // 2)),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        blocks=blocks,
        channels=channels,
    )


def own_trial(base: TrainConfig) -> FixedTrial:
    """The trial that is `base` itself, with its warm-up cut to what is allowed.

    Raises InputError where another value is outside the search space.
    """
    shape = (base.blocks, base.channels)
    names = {numbers: name for name, numbers in SHAPES.items()}
    warm_up = min(base.warmup_epochs, max(1, base.epochs // 2))
    name = names.get(shape, f"blocks and channels {shape}")
    trial = FixedTrial({**asdict(base), "warmup_epochs": warm_up, "shape": name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a number out of range Optuna only warns
        try:
            suggest(trial, base)
        except (UserWarning, ValueError) as error:
            raise InputError(
                "tune: the recipe itself, the first trial, is outside the search space "
                f"({error}): --set other values"
            ) from error
    return trial


def objective(train: ImageSet, base: TrainConfig, device: str = "auto") -> Objective:
    """What a trial does: train, and return the accuracy on the validation split after the last
    epoch. Each epoch's decides whether the trial is pruned; one that diverges is, too.

    Raises InputError where there is no validation split.
    """
    if not base.validation_size:
        raise InputError(
            "tune: expected a validation split to choose by, got none: "
            "use --set validation_size=1000"
        )
    target = choose_device(device)
    part, validation = split(train.to(target), base)

    def run(trial: Trial) -> float:
        config = resolve(suggest(trial, base), target, len(part))
        prepare(target, config.precision)
        normalisation = (config.test_mean, config.test_std, config.precision)
        state = State.new(config, target)
        step = Step(state, config)
        score = 0.0
        for state.epoch in range(config.epochs):
            plan = epoch_plan(config, len(part), state.epoch)
            try:
                train_one_epoch(step, part, config, plan, tqdm(disable=True))
            except InputError as error:
                raise TrialPruned(str(error)) from error
            logits = predict(state.final_model, validation.images, *normalisation)
            score = accuracy(logits, validation.labels)
            trial.report(score, state.epoch)
            if state.epoch < config.epochs - 1 and trial.should_prune():
                raise TrialPruned
        return score

    return run


def open_search(where: str, base: TrainConfig, seed: int = 1) -> optuna.Study:
    """The study of searches around `base`, in a journal file or at a database URL; made, with
    `base` itself as its first trial, if it isn't there yet. Raises InputError as `open_study`."""
    own = own_trial(base)
    space = {name: str(value) for name, value in {**asdict(base), **own.distributions}.items()}
    del space["blocks"], space["channels"]  # one parameter, the shape
    return open_study(where, space, own.params, seed)


def trials_table(path: str | Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """A journal's trials that finished or were pruned, and how much of the differences each
    parameter explains.

    The columns: number, accuracy (on the validation split after the trial's last epoch), duration,
    state (COMPLETE or PRUNED), and the parameters. The shares are PED-ANOVA's (Watanabe et al.
    2023, arXiv:2304.10255), of the finished trials, largest first. Raises InputError as `load`.
    """
    study = load(path)
    table = study.trials_dataframe(("number", "value", "duration", "state", "params"))
    table.columns = table.columns.str.removeprefix("params_")
    table = table.rename(columns={"value": "accuracy"}).dropna(subset="accuracy")
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return table, shares
