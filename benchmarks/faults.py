"""What a run does with what disks, kills and hasty hands do to its folder: damaged files, kill -9, two writers, a full
disk.

    python -m benchmarks.faults

Every fault is one command of `anybatch` in a process of its own (forked: imports are paid once) on a copy of a folder
that a killed run left. It ends

    refused     exit code 2 and a message
    same        exit code 0 and the results of the run that nothing happened to: plan, weights, log, figures, bit by bit
    silent      exit code 0 and other results: what must not happen
    crashed     anything else, a traceback or a signal

Of plans, checkpoints, memories and teacher embeddings every flipped bit is also given to the function alone that reads
them: thousands could be tried so.

The model is a random transformer of two layers; data, model and teacher are made here, nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from anybatch.core.files import CARD, file_digest, write_text

ROWS, FLIPS, KILLS = 96, 150, 20
WHOLE = 10  # of so many flips that were given to a reader, one is given to a whole command too
WORDS = [
    stem + end for stem in ("mat", "gra", "nod", "bat", "sof", "ten") for end in ("a", "o", "is", "er", "ing", "ed")
]
ENDS = ("refused", "same", "silent", "crashed")
Task = Callable[[], None]


def main() -> None:
    """Do all faults and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=FLIPS, help="Flipped bits for each kind of file.")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/faults.md"))
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        faults = Faults(Path(scratch), workers=options.workers)
        rows = faults.all(flips=options.flips, kills=options.kills)
    lines = [
        "# Faults",
        "",
        f"What a run does with damage, kills and other writers. {ROWS} pairs, a random transformer of two layers, "
        "SogCLR on mined batches. Every fault is one command on a copy of the folder of a killed run; *same* means "
        "plan, weights, log and figures of the undisturbed run, bit for bit. Made by `python -m benchmarks.faults "
        f"--flips {options.flips} --kills {options.kills}` on a {os.cpu_count()}-core {platform.machine()} CPU in "
        f"{(time.perf_counter() - started) / 60:.0f} minutes, seed 0.",
        "",
        f"| fault | tried | {' | '.join(ENDS)} |",
        f"|---|---|{'---|' * len(ENDS)}",
        *[f"| {name} | {ends.total()} | {' | '.join(str(ends[end]) for end in ENDS)} |" for name, ends in rows.items()],
        "",
    ]
    write_text(options.output, "\n".join(lines))
    print("\n".join(lines))
    sys.exit(any(ends["silent"] or ends["crashed"] for ends in rows.values()))


class Faults:
    """The folders of killed runs, what becomes of copies of them, and what should.

    Args:
        scratch: An empty folder.
        workers: Commands at a time.
    """

    def __init__(self, scratch: Path, *, workers: int = 2) -> None:
        self.scratch, self.workers = scratch, workers
        self.number = 0
        import_all()
        for name, seed in (("model", 1), ("teacher", 2), ("other teacher", 3)):
            run_apart(partial(make_model, scratch / name, seed))
        lines = [{"anchor": words(row, 2 + row % 5), "positive": words(row + 1000, 3 + row % 7)} for row in range(ROWS)]
        (scratch / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.whole = self.finished("whole")
        self.expected = {verb: results(self.whole, verb) for verb in ("mine", "train")}
        self.states = {
            "embedding": ("mine", self.stopped("embedding", "mine", "teacher: positives", ROWS)),
            "searching": ("mine", self.stopped("searching", "mine", "mining: graph", 0)),
            "mined": ("mine", self.finished("mined", verb="mine")),
            "training": ("train", self.stopped("training", "train", "training", 7)),
        }
        # The same, begun otherwise: what is put in the place of the files of the others.
        other = {"teacher": "other teacher", "more": ["--set", "seed=3"]}
        self.others = {
            "embedding": self.stopped("other embedding", "mine", "teacher: positives", ROWS, **other),
            "searching": self.stopped("other searching", "mine", "mining: graph", 0, **other),
            "mined": self.finished("other mined", verb="mine", **other),
            "training": self.stopped("other training", "train", "training", 7, **other),
        }

    def all(self, *, flips: int, kills: int) -> dict[str, Counter[str]]:
        """Every kind of fault; how often each ended how."""
        checkpoint = "checkpoints/checkpoint-6"
        readers = {
            "plan": ("training", "plan.safetensors", read_plan),
            "checkpoint": ("training", f"{checkpoint}/**/*", read_checkpoint),
            "memory": ("training", f"{checkpoint}/anybatch_loss.safetensors", read_checkpoint),
            "teacher": ("searching", "teacher_*", read_teacher),
        }
        rows: dict[str, Counter[str]] = {}
        generator = random.Random(0)

        def draw(state: str, pattern: str, count: int) -> list[tuple[str, str, float]]:
            return [
                (state, path, generator.random()) for path in generator.choices(self.files(state, pattern), k=count)
            ]

        for kind, (state, pattern, read) in readers.items():
            drawn = draw(state, pattern, flips)
            rows[f"bits flipped: {kind}, read"] = Counter(self.read(*one, read) for one in drawn)
            whole = drawn[::WHOLE]
            rows[f"bits flipped: {kind}"] = self.ends(
                partial(self.damaged, state, path, "flip", x) for state, path, x in whole
            )
        blocks = [
            *draw("searching", "neighbors/**/*", flips - flips // 2),
            *draw("embedding", "*.partial/*", flips // 2),
        ]
        records = [
            one
            for name in ("config.yaml", "metrics_untrained.json", "log.jsonl")
            for one in draw("training", name, flips // 15)
        ]
        for kind, drawn in (("blocks", blocks), ("records", records)):
            rows[f"bits flipped: {kind}"] = self.ends(
                partial(self.damaged, state, path, "flip", x) for state, path, x in drawn
            )
        for how, name in (
            ("cut", "cut short"),
            ("empty", "of zero length"),
            ("gone", "deleted"),
            ("swap", "of another run"),
        ):
            rows[f"files {name}"] = self.ends(
                partial(self.damaged, state, path, how, 0.5)
                for state in self.states
                for path in self.files(state, "**/*")
            )
        rows["checkpoints of another run"] = self.ends(
            [partial(self.damaged, "training", f"checkpoints/checkpoint-{step}", "swap", 0) for step in (3, 6)]
        )
        rows["kill -9, mine"] = self.ends(self.killed("mine", kills // 2))
        rows["kill -9, train"] = self.ends(self.killed("train", kills - kills // 2))
        rows["two writers"] = self.ends(
            partial(self.together, first, second) for first in ("mine", "train") for second in ("mine", "train")
        )
        sizes = [2**power for power in range(6, 18)]
        rows["disk full, then space"] = self.ends(
            partial(self.full, verb, size) for verb in ("mine", "train") for size in sizes
        )
        return rows

    def few(self) -> dict[str, Counter[str]]:
        """A few faults of each kind."""
        rows = {}
        for state, path in (
            ("training", "plan.safetensors"),
            ("training", "checkpoints/checkpoint-6/rng_state.pth"),
            ("training", "checkpoints/checkpoint-6/anybatch_loss.safetensors"),
            ("searching", "teacher_positive.npy"),
            ("searching", "neighbors/scores.npy"),
        ):
            rows[path] = self.ends([partial(self.damaged, state, path, how, 0.6) for how in ("flip", "swap")])
        rows["kill -9, mine"] = self.ends(self.killed("mine", 2))
        rows["kill -9, train"] = self.ends(self.killed("train", 2))
        rows["two writers"] = self.ends([partial(self.together, "mine", "train")])
        rows["disk full, then space"] = self.ends([partial(self.full, "mine", 2**12)])
        return rows

    def ends(self, faults: Iterator[Callable[[], str]] | Sequence[Callable[[], str]]) -> Counter[str]:
        """How each ended; several at a time."""
        with ThreadPoolExecutor(self.workers) as pool:
            return Counter(pool.map(lambda fault: fault(), list(faults)))

    def files(self, state: str, pattern: str) -> list[str]:
        """Files of the folder of a state, relative to it, but model cards, which no run reads."""
        folder = self.states[state][1]
        found = (path for path in folder.glob(pattern) if path.is_file() and path.name != CARD)
        return sorted(str(path.relative_to(folder)) for path in found)

    def arguments(self, verb: str, output: Path, *, teacher: str = "teacher", more: Sequence[str] = ()) -> list[str]:
        """A whole command."""
        values = ["mining.method=anybatch", "mining.cluster_size=4", "mining.window=[1, 6]"]
        values += ["loss.name=sogclr", "loss.gamma=0.6"]
        values += [
            "train.save_steps=3",
            "train.args.logging_steps=1",
            "train.mini_batch_size=6",
            "train.learning_rate=1e-3",
        ]
        values += ["model.device=cpu", f"evaluation.path={self.scratch / 'pairs.jsonl'}"]
        given = ["--data", str(self.scratch / "pairs.jsonl"), "--model", str(self.scratch / "model")]
        given += ["--teacher", str(self.scratch / teacher), "--batch-size", "12", "--output", str(output)]
        return [verb, *given, *(item for value in values for item in ("--set", value)), *more]

    def fresh(self, name: str = "") -> Path:
        """A new name in the scratch folder."""
        self.number += 1
        return self.scratch / (name or f"run-{self.number}-{random.getrandbits(40)}")

    def finished(self, name: str, *, verb: str = "train", **options: object) -> Path:
        """The folder of a run that nothing happened to."""
        folder = self.fresh(name)
        code, said = run_apart(partial(command, *self.arguments(verb, folder, **options)))  # pyright: ignore[reportArgumentType]
        assert code == 0, said
        return folder

    def stopped(self, name: str, verb: str, stage: str, done: int, **options: object) -> Path:
        """The folder of a run that was killed when it told of this progress."""
        folder = self.fresh(name)
        arguments = self.arguments(verb, folder, **options)  # pyright: ignore[reportArgumentType]
        code, said = run_apart(partial(command, *arguments, stop=(stage, done)))
        assert code == -signal.SIGKILL, said
        return folder

    def read(self, state: str, path: str, where: float, read: Callable[[Path], bool]) -> str:
        """How a reader ends that is given a file with a flipped bit, which is mended afterwards."""
        from anybatch.core.errors import AnybatchError

        folder = self.states[state][1]
        content = (folder / path).read_bytes()
        damage(folder / path, "flip", where, folder)
        try:
            return "same" if read(folder) else "silent"
        except AnybatchError:
            return "refused"
        except Exception as error:
            return f"crashed {error!r}"
        finally:
            (folder / path).write_bytes(content)

    def damaged(self, state: str, path: str, how: str, where: float) -> str:
        """Resume a copy of the folder of a state, after this was done to one of its files."""
        verb, folder = self.states[state]
        copy = self.fresh()
        shutil.copytree(folder, copy)
        damage(copy / path, how, where, self.others[state] / path)
        said = "checkpoint-6" if "checkpoint-6" in path else "again" if "neighbors" in path or "partial" in path else ""
        return self.resumed(verb, copy, said=said if how == "flip" else "")

    def resumed(self, verb: str, folder: Path, *, said: str = "") -> str:
        """How a run ends that goes on in `folder`, which is removed; if it goes on, it must speak of what it did
        (`said`).
        """
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        code, told = run_apart(partial(command, *self.arguments(verb, folder, more=resume)))
        try:
            if code == 2 and "Traceback" not in told:
                return "refused"
            if code != 0:
                print(told[-2000:], file=sys.stderr)
                return "crashed"
            return "same" if said in told and results(folder, verb) == self.expected[verb] else "silent"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def killed(self, verb: str, count: int) -> list[Callable[[], str]]:
        """Runs that are killed at `count` of the moments at which they touch files, evenly spread, and then go on."""
        folder = self.fresh()
        code, said = run_apart(partial(command, *self.arguments(verb, folder), touched=sys.maxsize))
        assert code == 0, said
        total = int(said.rsplit("touched ", 1)[1])
        shutil.rmtree(folder)

        def kill(number: int) -> str:
            folder = self.fresh()
            code, said = run_apart(partial(command, *self.arguments(verb, folder), touched=number))
            return self.resumed(verb, folder) if code == -signal.SIGKILL else f"crashed {said}"

        return [partial(kill, 1 + round((total - 1) * (place + 0.5) / count)) for place in range(count)]

    def together(self, first: str, second: str) -> str:
        """A command in a folder that another one is at work in, which goes on undisturbed."""
        folder = self.fresh()
        moment, gate = folder.with_name(folder.name + ".moment"), folder.with_name(folder.name + ".gate")
        arguments = self.arguments(first, folder)
        with ThreadPoolExecutor(1) as pool:
            at_work = pool.submit(run_apart, partial(command, *arguments, wait=(moment, gate)))
            while not moment.exists() and not at_work.done():
                time.sleep(0.01)
            code, said = run_apart(partial(command, *self.arguments(second, folder, more=["--resume"])))
            gate.touch()
            first_code, first_said = at_work.result()
        if first_code != 0 or results(folder, first) != self.expected[first]:
            return f"crashed {first_said}"
        return "refused" if code == 2 and "is in use: process" in said else "silent"

    def full(self, verb: str, size: int) -> str:
        """A run whose files may not grow past `size` bytes, as on a full disk; then it goes on with space."""
        folder = self.fresh()
        code, said = run_apart(partial(command, *self.arguments(verb, folder), most=size))
        if code not in (0, 2) or "Traceback" in said:
            print(said[-2000:], file=sys.stderr)
            return "crashed"
        return self.resumed(verb, folder)


def read_plan(folder: Path) -> bool:
    """False if a damaged plan can be read."""
    from anybatch.plans.plan import BatchPlan

    BatchPlan.load(folder / "plan.safetensors")
    return False


def read_checkpoint(folder: Path) -> bool:
    """Whether the checkpoint before is taken, and not the damaged one."""
    from anybatch.integrations.sentence_transformers import last_whole_checkpoint

    return last_whole_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "checkpoint-3"


def read_teacher(folder: Path) -> bool:
    """False if damaged embeddings can be read."""
    from anybatch.run.teacher import read_embeddings

    for side in ("anchor", "positive"):
        read_embeddings(str(folder / f"teacher_{side}.npy"), ROWS)
    return False


def damage(path: Path, how: str, where: float, other: Path) -> None:
    """Do `how` to a file, at the fraction `where` of it; a folder can be swapped too."""
    if how == "swap":
        if path.is_dir():
            shutil.rmtree(path)
            shutil.copytree(other, path)
        elif other.exists():
            shutil.copyfile(other, path)
        return
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flip":
        if content:
            bit = int(where * 8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if how == "empty" else len(content) // 2])


def results(folder: Path, verb: str) -> list[object]:
    """What a run is for."""
    from anybatch.plans.plan import BatchPlan

    found: list[object] = [BatchPlan.load(folder / "plan.safetensors").digest]
    if verb == "train":
        result = json.loads((folder / "metrics.json").read_text())
        found += [result[name] for name in ("metrics", "metrics_untrained", "log", "num_steps")]
        found += [file_digest(folder / "model" / "model.safetensors"), (folder / "log.jsonl").read_text()]
    return found


def command(
    *arguments: str,
    stop: tuple[str, int] | None = None,
    wait: tuple[Path, Path] | None = None,
    touched: int = 0,
    most: int = 0,
) -> None:
    """One `anybatch` command, in this process, which it ends.

    Args:
        arguments: Of the command line.
        stop: Kill at this stage and this progress.
        wait: Make the first file when mining begins, and wait for the second.
        touched: Kill at that time of touching a file; told at the end how many there were.
        most: Bytes that no file may grow past.
    """
    from anybatch.cli import main as anybatch
    from anybatch.cli.progress import Bars
    from anybatch.integrations.sentence_transformers import embed
    from anybatch.mining import neighbors

    embed.SHARD, neighbors.UNIT_ROWS, neighbors.BLOCK_UNITS = 20, 10, 2
    told = Bars.__call__

    def hear(self: Bars, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        if stop is not None and (stage, done >= stop[1]) == (stop[0], True):
            os.kill(os.getpid(), signal.SIGKILL)
        if wait is not None and stage.startswith("mining") and not wait[0].exists():
            wait[0].touch()
            while not wait[1].exists():
                time.sleep(0.01)
        told(self, stage, done, total, figures)

    Bars.__call__ = hear
    count = 0
    folder = arguments[arguments.index("--output") + 1]

    def watch(event: str, given: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod") and str(given[0]).startswith(
            folder
        ):
            count += 1
            if count == touched:
                os.kill(os.getpid(), signal.SIGKILL)

    if touched:
        sys.addaudithook(watch)
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv = ["anybatch", *arguments]
    try:
        anybatch()
    finally:
        if touched:
            print(f"touched {count}", file=sys.stderr)


def run_apart(task: Task) -> tuple[int, str]:
    """Run in a forked process; its exit code (negative: the signal that ended it) and all that it said."""
    with tempfile.TemporaryFile("w+") as heard:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_the_child(task, heard.fileno())
        _, status = os.waitpid(child, 0)
        heard.seek(0)
        return os.waitstatus_to_exitcode(status), heard.read()


def _be_the_child(task: Task, output: int) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        out, err = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        with out, err, redirect_stdout(out), redirect_stderr(err):
            code = _exit_code(task)
    finally:
        os._exit(code)


def _exit_code(task: Task) -> int:
    import traceback

    try:
        task()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def import_all() -> None:
    """What every command needs, once, on one thread: forked processes have no others."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    import datasets  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch

    import anybatch.cli.app
    import anybatch.integrations.sentence_transformers  # noqa: F401

    torch.set_num_threads(1)


def make_model(folder: Path, seed: int) -> None:
    """A transformer of two layers of width 32 with random weights and dropout, and a tokenizer of whole words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with tempfile.TemporaryDirectory() as scratch:
        bert = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
        BertModel(bert).save_pretrained(scratch)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
            scratch
        )
        modules = [Transformer(scratch, max_seq_length=24), Pooling(32)]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))


def words(number: int, length: int) -> str:
    """Made-up words."""
    generator = random.Random(number)
    return " ".join(generator.choice(WORDS) for _ in range(length))


if __name__ == "__main__":
    main()
