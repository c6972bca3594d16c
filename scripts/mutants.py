"""Check that the tests notice wrong lines: make small changes to the package, one at a time.

    python -m scripts.mutants                  200 changes, drawn by a seed, into results/mutants.md
    python -m scripts.mutants --count 40 --only train fit       some modules, and no report
    python -m scripts.mutants --count 0 --named scripts/named_mutants.json   those written by hand

Every change is made in a copy of the working tree. The tree itself never changes, and commands that
tests start as child processes see the change too. Each mutant gets a process that is forked after
the heavy imports, runs the tests that reach its line, the fastest first, and stops at the first
failure. A mutant that runs out of time counts as killed. Each verdict is stored in runs/mutants/ at
once, so a stopped run can be resumed. mutmut and cosmic-ray, which do more, were not tried. This
script draws a sample by a seed, also tries changes written by hand, and imports torch once.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "runs" / "mutants"
JUDGED = ROOT / "scripts" / "judged_mutants.json"  # survivors (module, old, new), and why they may
HEAVY = "torch torchvision torchinfo pandas scipy.stats scipy.optimize sklearn.metrics pydantic"
HEAVY += " matplotlib.pyplot optuna torch._dynamo PIL.Image"
SLOWEST = 20.0  # seconds: slower tests decide nothing that a faster one doesn't, or too late
# The operators that are mistaken for each other.
OPPOSITE = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn}
OPPOSITE |= {ast.Is: ast.IsNot, ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or}
OPPOSITE |= {other: one for one, other in OPPOSITE.items()} | {ast.FloorDiv: ast.Mult}
# These change no result, only words for people, or speed. A line with one of them isn't changed.
NO_MEANING = "help= unit= stacklevel log( print( remedy BATCHES_TOGETHER LOOK_EVERY set_desc"
NO_MEANING += " hardware.prepare( mallopt libc_ver lru_cache fused= acquire(timeout fullgraph="
# Keywords that say how fast or where, that repeat the default (the last one, on Linux), or that
# state what always holds (strict).
NEUTRAL = ("stacklevel", "device", "leave", "refresh", "memory_format", "align_corners", "strict")
NEUTRAL += ("lineterminator",)


@dataclass(frozen=True)
class Mutant:
    """`old`, at `start` in the module's text, becomes `new`."""

    module: str
    line: int
    kind: str
    start: int
    old: str
    new: str

    def key(self, source: str) -> str:
        digest = hashlib.sha256(source.encode()).hexdigest()[:12]
        return f"{self.module}:{self.start}:{self.old}:{self.new}:{digest}"

    def applied(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.start + len(self.old) :]


# From source to mutants


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Return all changes that this script can make to a module."""
    lines = source.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))
    found: dict[Mutant, str] = {}

    def offset(line: int, column: int) -> int:
        # ast counts columns in bytes of UTF-8
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for node in _meaningful(ast.parse(source)):
        for kind, change in _changes(node):
            begin, end = node.lineno, node.end_lineno
            start = offset(begin, node.col_offset)
            old = source[start : offset(end, node.end_col_offset)]
            new = ast.unparse(change)
            if isinstance(change, (ast.BinOp, ast.BoolOp)):
                new = f"({new})"
            mutant = Mutant(module, begin, kind, start, old, new)
            if not any(word in "".join(lines[begin - 1 : end]) for word in NO_MEANING.split()):
                found[mutant] = mutant.applied(source)
    return [mutant for mutant, text in found.items() if text != source and _compiles(text)]


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _meaningful(node: ast.AST):
    """Yield the nodes below, without annotations, messages and docstrings."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            message = isinstance(child, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom))
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not message and not docstring:
                yield from _meaningful(child)


def _changes(node: ast.AST):
    """Yield (kind, what takes its place) for each way in which this node can be wrong."""
    match node:
        case ast.Compare(ops=[operator]):
            yield "comparison", ast.Compare(node.left, [_opposite(operator)], node.comparators)
        case ast.Constant(value=bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", ast.Constant(value + 1 if value in (0, 1, -1) else value * 2)
        case ast.BinOp(op=operator) if type(operator) in OPPOSITE:
            yield "arithmetic", ast.BinOp(node.left, _opposite(operator), node.right)
        case ast.BoolOp(op=operator):
            yield "and/or", ast.BoolOp(_opposite(operator), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield "not removed", ast.Call(ast.Name("bool"), [node.operand], [])
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "statement dropped", ast.Pass()
        case ast.Subscript(slice=ast.Constant(value=str() as name)):
            yield "key", ast.Subscript(node.value, ast.Constant(f"{name}_"))
        case ast.Call(args=[ast.Name() | ast.Attribute() as first, second, *rest]) if isinstance(
            second, (ast.Name, ast.Attribute)
        ):
            yield "arguments swapped", ast.Call(node.func, [second, first, *rest], node.keywords)
    for dropped in node.keywords if isinstance(node, ast.Call) else []:
        if dropped.arg not in (None, "frozen", *NEUTRAL):
            kept = [keyword for keyword in node.keywords if keyword is not dropped]
            yield "keyword dropped", ast.Call(node.func, node.args, kept)


def _opposite(operator: ast.AST) -> ast.AST:
    return OPPOSITE[type(operator)]()


def chosen(sources: dict[str, str], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants, spread over modules by their lines, and evenly over kinds."""
    dice, picked = random.Random(seed), []
    lines = {name: len(source.splitlines()) for name, source in sources.items()}
    for name, source in sources.items():
        kinds = defaultdict(list)
        for mutant in mutants_of(name, source):
            kinds[mutant.kind].append(mutant)
        for group in kinds.values():
            dice.shuffle(group)
        wanted, here = round(count * lines[name] / sum(lines.values())), []
        while len(here) < wanted and any(kinds.values()):
            for group in kinds.values():
                if group and len(here) < wanted:
                    here.append(group.pop())
        picked += here
    return picked


def named(path: Path, sources: dict[str, str]) -> list[Mutant]:
    """Return the mutants written by hand: objects with module, old (found once) and new."""
    result = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        module, old, new = entry["module"], entry["old"], entry["new"]
        if sources.get(module, "").count(old) != 1:
            print(f"not found once, write it anew: {module}: {old!r}")
            continue
        start = sources[module].index(old)
        line = sources[module].count("\n", 0, start) + 1
        result.append(Mutant(module, line, "by hand", start, old, new))
    return result


# From mutants to verdicts


class Reach:
    """A pytest plugin that notes which lines of the package each test runs, and its seconds."""

    def __init__(self, package: str):
        self.package, self.tests, self.hits = package, {}, set()

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.package):
            return None
        if event in ("line", "call"):
            # No Path: a test may have said that this is Windows.
            name = os.path.basename(frame.f_code.co_filename).removesuffix(".py")
            self.hits.add(f"{name}:{frame.f_lineno}")
        return self._trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        _forget_cached_results(Path(self.package).name)
        self.hits, self.shared, began = set(), set(), time.perf_counter()
        self.failed = False
        sys.settrace(self._trace)
        threading.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            seconds = time.perf_counter() - began
            entry = {"seconds": seconds, "lines": sorted(self.hits), "shared": sorted(self.shared)}
            self.tests[item.nodeid] = entry | {"failed": self.failed}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        result = yield
        self.shared = set(self.hits)  # fixtures of a module run in its first test only
        return result

    def pytest_runtest_logreport(self, report):
        self.failed |= not report.passed


def _forget_cached_results(package: str) -> None:
    """Forget cached results, so that every test that needs one is seen to reach its function."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def run_tests(tree: Path, arguments: list[str], plugins: list, log: Path) -> int:
    """Run pytest in this (forked) process with the package of `tree`, and return its exit code.

    The tree's pyproject.toml puts the tree itself before everything else that is importable.
    """
    os.chdir(tree)
    del sys.modules["scripts"]  # this checkout's: the tests import the tree's
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tree)]
    return int(pytest.main([*options, *arguments], plugins=plugins))


def forked(call, limit: float) -> int | None:
    """Return the exit code of `call` in a process of its own, or None if it took too long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 3
        try:
            code = call()
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(child, signal.SIGKILL)  # with the commands that it started
    os.waitpid(child, 0)
    return None


def copied(folder: Path) -> Path:
    """Copy the working tree into `folder`: what git tracks, and what is new and not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def reach(tree: Path) -> dict[str, dict]:
    """Return what each test reaches. It is measured once for each state of package and tests."""
    digest = hashlib.sha256()
    for path in sorted([*tree.glob("cifar_lib/*.py"), *tree.glob("tests/*.py")]):
        digest.update(path.read_bytes())
    stored = STORE / f"reach-{digest.hexdigest()[:12]}.json"
    if not stored.exists():
        print("which test reaches which line: the tests run once, traced", flush=True)
        plugin = Reach(str(tree / "cifar_lib"))

        def measure() -> int:
            # Notebooks take minutes, and the reliability runs test themselves.
            skipped = ["--ignore=tests/test_notebooks.py", "--ignore=tests/test_reliability.py"]
            arguments = ["--maxfail=1000", *skipped, "tests"]
            code = run_tests(tree, arguments, [plugin], STORE / "reach.log")
            stored.write_text(json.dumps(plugin.tests), encoding="utf-8")
            return code

        forked(measure, limit=3600)
    return json.loads(stored.read_text(encoding="utf-8"))


def deciding(mutant: Mutant, tests: dict[str, dict]) -> list[str]:
    """Return the tests that can notice the mutant, the fastest first."""
    sound = {name: t for name, t in tests.items() if not t["failed"] and t["seconds"] < SLOWEST}
    wanted = {f"{mutant.module}:{mutant.line + i}" for i in range(mutant.old.count("\n") + 1)}
    direct = {name for name, t in sound.items() if wanted & set(t["lines"])}
    files = {name.split("::")[0] for name in direct if wanted & set(sound[name]["shared"])}
    # What runs in child processes isn't traced: the module's own tests may start them.
    files.add(f"tests/test_{mutant.module}.py")
    names = direct | {name for name in sound if name.split("::")[0] in files}
    # If no test reaches the line, it runs when the module is imported, and any test may notice.
    if not direct:
        names = set(sound)
    return sorted(names, key=lambda name: sound[name]["seconds"])


def judge(mutant: Mutant, source: str, tree: Path, tests: dict[str, dict]) -> str:
    """Run the mutant, and return `killed`, `timeout` or `survived`."""
    names = deciding(mutant, tests)
    if not names:
        return "survived"
    target = tree / "cifar_lib" / f"{mutant.module}.py"
    target.write_text(mutant.applied(source), encoding="utf-8")
    limit = 30 + 4 * sum(tests[name]["seconds"] for name in names)
    log = STORE / f"{tree.name}.log"
    code = forked(lambda: run_tests(tree, names, [], log), limit)
    target.write_text(source, encoding="utf-8")
    return {None: "timeout", 0: "survived"}.get(code, "killed")


def report(mutants: list[Mutant], verdicts: list[str], seed: int) -> str:
    """Return the table by module, and the survivors, with what JUDGED says of them."""
    pairs = list(zip(mutants, verdicts, strict=True))
    rows = []
    for module in sorted({mutant.module for mutant in mutants}):
        here = [verdict for mutant, verdict in pairs if mutant.module == module]
        rows.append(f"| {module} | {len(here)} | {len(here) - here.count('survived')} |")
    entries = json.loads(JUDGED.read_text(encoding="utf-8"))
    judged = {(entry["module"], entry["old"], entry["new"]): entry["why"] for entry in entries}
    survivors = []
    for mutant in (mutant for mutant, verdict in pairs if verdict == "survived"):
        old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
        where = f"cifar_lib/{mutant.module}.py:{mutant.line} ({mutant.kind})"
        why = judged.get((mutant.module, mutant.old, mutant.new), "not judged yet")
        survivors.append(f"- {where}: `{old}` became `{new}`: {why}")
    lines = "\n".join
    return f"""# Mutants

Small changes to the package, and whether its tests notice; written by
`python -m scripts.mutants --named scripts/named_mutants.json` (seed {seed}).

- Drawn: {_share(pairs, by_hand=False)}
- Written by hand: {_share(pairs, by_hand=True)}

| module | tried | killed |
| --- | ---: | ---: |
{lines(rows)}

## Survivors

{lines(survivors) or "None."}
"""


def _share(pairs: list[tuple[Mutant, str]], by_hand: bool) -> str:
    """Say how many of the changes of one origin the tests notice."""
    verdicts = [verdict for mutant, verdict in pairs if (mutant.kind == "by hand") == by_hand]
    killed = sum(verdict != "survived" for verdict in verdicts)
    hanging = verdicts.count("timeout")
    return (
        f"of {len(verdicts)} changes {killed} are noticed ({killed / max(len(verdicts), 1):.1%}), "
        f"{hanging} of them because the tests ran out of time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of modules; the report isn't written then")
    parser.add_argument("--named", type=Path, help="a JSON list of mutants written by hand")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # else a file changed twice a second looks the same
    sys.dont_write_bytecode = True
    STORE.mkdir(parents=True, exist_ok=True)
    paths = sorted((ROOT / "cifar_lib").glob("[!_]*.py"))
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    wanted = {k: v for k, v in sources.items() if not options.only or k in options.only}
    mutants = chosen(wanted, options.count, options.seed)
    mutants += named(options.named, sources) if options.named else []

    for name in HEAVY.split():
        importlib.import_module(name)
    kept = STORE / "verdicts.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    known = {entry["key"]: entry["verdict"] for entry in map(json.loads, lines)}
    free, verdicts = queue.SimpleQueue(), []  # trees that nobody changes at the moment
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        for i in range(options.workers):
            free.put(copied(Path(folder, f"tree-{i}")))
        tree = free.get()
        tests = reach(tree)
        control = ["--collect-only", *tests]
        if forked(lambda: run_tests(tree, control, [], STORE / "control.log"), 300) != 0:
            sys.exit("the tests can't be named one by one: see runs/mutants/control.log")
        free.put(tree)

        def verdict_on(mutant: Mutant) -> str:
            source = sources[mutant.module]
            before = known.get(mutant.key(source), "survived")
            if before != "survived":  # a survivor is tried again: new tests may notice it
                return before
            tree = free.get()
            verdict = judge(mutant, source, tree, tests)
            free.put(tree)
            return verdict

        for mutant, verdict in zip(mutants, pool.map(verdict_on, mutants), strict=True):
            verdicts.append(verdict)
            row = {"key": mutant.key(sources[mutant.module]), "verdict": verdict, **asdict(mutant)}
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            old, new = mutant.old[:50], mutant.new[:50]
            print(f"{verdict:9} {mutant.module}:{mutant.line} {old!r} -> {new!r}", flush=True)
    text = report(mutants, verdicts, options.seed)
    print(text)
    if not options.only and options.count >= 100:
        (ROOT / "results" / "mutants.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
