"""The checks before anything else: the interpreter that make takes, its environment, the disk, versions, checkouts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from sepllm_train import requirements
from sepllm_train.cli.environment import advice, facts

Usage = namedtuple("Usage", "total used free")
RANGE = requirements.declared().python  # type: ignore[union-attr]


@pytest.fixture
def interpreters(tmp_path: Path) -> Path:
    """A folder that is the whole PATH: what find_python.sh itself needs, and no Python."""
    folder = tmp_path / "path"
    folder.mkdir()
    for tool in ("sh", "sed", "dirname"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


def interpreter(path: Path, version: str, kind: str = "ok") -> None:
    """A program that answers as Python of `version` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{version.replace(".", " ")} {kind}"\n')
    path.chmod(0o755)


def find(repository: Path, path: Path, *arguments: str, pyenv: Path = Path("/nowhere")) -> str:
    """Answer of find_python.sh, with its exit code checked: the path, or the message."""
    done = subprocess.run(
        ["sh", str(repository / "scripts" / "find_python.sh"), *arguments],
        env={"PATH": str(path), "PYENV_ROOT": str(pyenv)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("error: ").strip()
    assert not done.stderr
    return done.stdout.strip()


def test_the_range_is_that_of_the_messages() -> None:
    assert RANGE == ">=3.11,<3.14"


def test_python3_is_taken_first_then_the_newest(repository: Path, interpreters: Path) -> None:
    interpreter(interpreters / "python3.11", "3.11.2")
    assert find(repository, interpreters) == str(interpreters / "python3.11")
    interpreter(interpreters / "python3.13", "3.13.0")
    assert find(repository, interpreters) == str(interpreters / "python3.13")
    interpreter(interpreters / "python3", "3.10.2")
    assert find(repository, interpreters) == str(interpreters / "python3.13")
    interpreter(interpreters / "python3", "3.12.1")
    assert find(repository, interpreters) == str(interpreters / "python3")


def test_a_shim_that_does_not_run_is_passed_over(repository: Path, interpreters: Path, tmp_path: Path) -> None:
    """As pyenv's are for versions that are not switched on; its own folder is looked into last."""
    for name in ("python3", "python3.13"):
        (interpreters / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
        (interpreters / name).chmod(0o755)
    own = tmp_path / "with space" / "versions" / "3.13.0" / "bin" / "python3"
    interpreter(own, "3.13.0")
    assert find(repository, interpreters, pyenv=tmp_path / "with space") == str(own)


def test_one_minor_version_is_asked_for(repository: Path, interpreters: Path) -> None:
    interpreter(interpreters / "python3", "3.11.2")
    assert "no Python 3.13 here (python3 is Python 3.11.2)" in find(repository, interpreters, "", "13")
    interpreter(interpreters / "python3.13", "3.13.1")
    assert find(repository, interpreters, "", "13") == str(interpreters / "python3.13")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "there is no Python 3.11 to 3.13 here (no python3 is on the PATH): install Python 3.13"),
        ({"python3": ("3.9.2", "ok")}, "there is no Python 3.11 to 3.13 here (python3 is Python 3.9.2): install"),
        ({"python3": ("3.14.0", "ok")}, "Python 3.14 is not tested yet: use 3.11 to 3.13 (python3 is Python 3.14.0;"),
        ({"python3.14": ("3.14.0", "ok")}, "Python 3.14 is not tested yet: use 3.11 to 3.13 (python3.14 is Python"),
        ({"python3": ("3.12.3", "novenv")}, "apt-get install python3.12-venv"),
        ({"python3": ("3.13.1", "freethreaded")}, "python3 is the free-threaded build of Python 3.13.1"),
    ],
)
def test_no_suitable_interpreter(
    repository: Path, interpreters: Path, found: dict[str, tuple[str, str]], words: str
) -> None:
    for name, (version, kind) in found.items():
        interpreter(interpreters / name, version, kind)
    assert words in find(repository, interpreters)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("3.10.13", "PYTHON=mine is Python 3.10.13: use 3.11 to 3.13."),
        ("3.14.0", "PYTHON=mine is Python 3.14.0; Python 3.14 is not tested yet: use 3.11 to 3.13."),
        (None, "PYTHON=mine is no Python that runs"),
    ],
)
def test_the_interpreter_that_was_named(repository: Path, interpreters: Path, version: str | None, words: str) -> None:
    interpreter(interpreters / "python3", "3.12.1")
    if version:
        interpreter(interpreters / "mine", version)
    assert words in find(repository, interpreters, "mine")


def test_make_ends_with_the_sentence(repository: Path) -> None:
    done = subprocess.run(
        ["make", "install", "VENV=/nowhere/.venv", "PYTHON=no-such-python"],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "PYTHON=no-such-python is no Python that runs" in done.stderr


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """scripts/install.py as a module."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import install

    return install


def environment(folder: Path, *markers: str, pip: bool = True) -> Path:
    """A folder with a Python that runs, and pip where it is said."""
    (folder / "bin").mkdir(parents=True)
    code = f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n' if not pip else f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    (folder / "bin" / "python").write_text(code)
    (folder / "bin" / "python").chmod(0o755)
    for marker in markers:
        (folder / marker).touch()
    return folder


def test_environment_that_is_complete(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = environment(tmp_path / "venv", ".installed")
    assert script.main(["--venv", str(folder)]) == 0
    os.utime(folder / ".installed", (0, 0))
    assert script.main(["--venv", str(folder), "--ready"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def pip(script, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Constraints of each start of pip, which installs nothing; `-m venv` makes an environment."""
    started: list[list[str]] = []

    def run(command: list[str], what: str) -> None:
        if what == "python -m venv":
            assert command[0] == sys._base_executable  # type: ignore[attr-defined]  # the only one that stays
            environment(Path(command[-1]))
            (Path(command[-1]) / "pyvenv.cfg").touch()
        else:
            started.append(Path(command[command.index("-c") + 1]).read_text().splitlines())

    monkeypatch.setattr(script, "run", run)
    return started


def lose_python(folder: Path) -> None:
    """As after an upgrade of the system, which leaves a link to nowhere."""
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to("/nowhere/python3.12")


def test_environment_of_make_is_made_again(script, pip, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "check_disk", lambda *_: None)
    folder = tmp_path / "venv"
    assert script.main(["--venv", str(folder)]) == 0
    assert "made by make" in (folder / ".installed").read_text()
    for _ in range(2):  # the mark outlives the repair
        (folder / "left").touch()
        lose_python(folder)
        assert script.main(["--venv", str(folder)]) == 0
        assert "(its Python is gone): it is made again" in capsys.readouterr().out
        assert not (folder / "left").exists() and (folder / ".installed").exists()
    # Killed before `python -m venv` wrote anything.
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".installing").write_text("made by make\n")
    assert script.main(["--venv", str(folder)]) == 0 and len(pip) == 4


@pytest.mark.parametrize("case", ["made by the user", "marks of earlier versions", "no environment any more"])
def test_environment_of_the_user_is_not_deleted(script, pip, case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also after make has installed into it and left its marks there."""
    monkeypatch.setattr(script, "check_disk", lambda *_: None)
    folder = tmp_path / "venv"
    if case != "no environment any more":
        environment(folder)
        (folder / "pyvenv.cfg").touch()
    assert script.main(["--venv", str(folder)]) == 0
    if case == "marks of earlier versions":
        (folder / ".installed").write_text("")
        (folder / ".installing").write_text("")
    elif case == "no environment any more":
        (folder / "pyvenv.cfg").unlink()
    (folder / "notes").touch()
    lose_python(folder)
    capsys.readouterr()
    assert script.main(["--venv", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "holds no environment whose Python runs: make clean && make install" in err and err.count("\n") == 1
    assert (folder / "notes").exists() and (folder / "bin" / "python").is_symlink() and len(pip) == 1


def test_nothing_is_written_before_the_disk_is_checked(script, pip, tmp_path: Path, monkeypatch, capsys) -> None:
    """So that the CPU build which the sentence asks for is the user's, and kept."""
    monkeypatch.setattr(script, "cuda_build", lambda *_: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 5 * 10**9))
    folder = tmp_path / "deep" / "venv"
    assert script.main(["--venv", str(folder)]) == 2
    assert "install PyTorch's CPU build first" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    environment(folder)
    assert os.listdir(folder) == ["bin"]
    monkeypatch.setenv("PYTHONPATH", str(installed(tmp_path / "site", "torch", "2.15.0+cpu")))
    for _ in range(2):
        assert script.main(["--venv", str(folder)]) == 0
        assert "torch was chosen by the user" in (folder / ".installed").read_text()
        os.utime(folder / ".installed", (0, 0))
    for lines in pip:
        assert [line for line in lines if line.startswith(("torch", "triton"))] == ["torch==2.15.0+cpu"]
    assert len(pip) == 2


@pytest.mark.parametrize(
    ("marker", "text", "kept"),
    [
        (".installing", "", True),
        (".installing", "made by make\n", True),
        (".installing", "made by make\ntorch follows constraints.txt\n", False),
        (".installed", "", False),
        (".installed", "torch was chosen by the user\n", True),
        (".installed", "torch follows constraints.txt\n", False),
    ],
)
def test_torch_of_make_and_of_the_user(script, pip, marker, text, kept: bool, tmp_path: Path, monkeypatch) -> None:
    """The torch that make's own pip installed follows constraints.txt, and needs the disk of a new one then."""
    sizes: list[str | None] = []
    monkeypatch.setattr(script, "check_disk", lambda folder, torch, *_: sizes.append(torch))
    monkeypatch.setenv("PYTHONPATH", str(installed(tmp_path / "site", "torch", "2.15.0+cpu")))
    folder = environment(tmp_path / "venv")
    (folder / marker).write_text(text)
    os.utime(folder / marker, (0, 0))
    assert script.main(["--venv", str(folder)]) == 0
    assert sizes == ["2.15.0+cpu" if kept else None]
    assert ("torch==2.15.0+cpu" in pip[0], "torch==2.13.0" in pip[0]) == (kept, not kept)
    assert ("made by make" in (folder / ".installed").read_text()) == ("made by make" in text)


def test_environment_is_completed_with_its_own_python(repository: Path, interpreters: Path, tmp_path: Path) -> None:
    """The interpreter that it was made from may be off the PATH."""
    checkout = copy_of_checkout(repository, tmp_path / "checkout")
    stub = "import sys\nif '--ready' in sys.argv: sys.exit(1)\nprint('completed', *sys.argv[1:])\n"
    (checkout / "scripts" / "install.py").write_text(stub)
    folder = environment(tmp_path / "venv", ".installed")
    command = ["sh", str(checkout / "scripts" / "install.sh"), "", "--venv", str(folder)]
    variables = {"PATH": str(interpreters), "PYENV_ROOT": "/nowhere"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"completed --venv {folder}\n"), done.stderr
    command[2] = "no-such-python"
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "PYTHON=no-such-python is no Python that runs" in done.stderr


def test_environment_without_pip(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = environment(tmp_path / "venv", pip=False)
    assert script.main(["--venv", str(folder)]) == 2
    assert "is an environment without pip: make clean && make install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("python", "chosen", "words"),
    [
        ((3, 10, 1), None, "was made with Python 3.10.1: Python 3.10.1 is too old: use 3.11 to 3.13, with make clean"),
        ((3, 14, 0), None, "Python 3.14 is not tested yet: use 3.11 to 3.13"),
        ((3, 12, 1), (3, 13, 0), "was made with Python 3.12.1, not with 3.13.0 of PYTHON="),
    ],
)
def test_environment_of_another_python(script, tmp_path: Path, python, chosen, words: str) -> None:
    state = script.State(True, True, True, python, True, None, None)
    with pytest.raises(script.Failure, match=words):
        script.refuse(tmp_path, state, chosen)


def test_environment_with_another_checkout(script, repository: Path, tmp_path: Path) -> None:
    other = copy_of_checkout(repository, tmp_path / "other")
    state = script.State(True, True, True, (3, 12, 1), True, "2.13.0", other / "sepllm_train")
    with pytest.raises(script.Failure, match=f"has the checkout {other} installed, not {repository}"):
        script.refuse(tmp_path, state, None)
    script.refuse(tmp_path, state._replace(package=repository / "sepllm_train"), None)


@pytest.mark.parametrize(
    ("torch", "cuda", "free", "words"),
    [
        (None, True, 5.0, "needs about 8.0 GB with a CUDA build of torch, and 5.0 GB are free"),
        (None, False, 3.0, "needs about 4.0 GB with a CPU build"),
        (None, False, 5.0, None),
        (None, True, 9.0, None),
        ("2.13.0", True, 1.0, "needs about 2.0 GB torch 2.13.0 is there already"),
        ("2.13.0", True, 3.0, None),
    ],
)
def test_disk(script, tmp_path: Path, monkeypatch, torch, cuda: bool, free: float, words: str | None) -> None:
    monkeypatch.setattr(script, "cuda_build", lambda *_: cuda)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, int(free * 10**9)))
    if words is None:
        script.check_disk(tmp_path, torch, [])
    else:
        with pytest.raises(script.Failure, match=words):
            script.check_disk(tmp_path, torch, [])


def test_torch_of_the_user_is_kept(script, tmp_path: Path) -> None:
    """pip would exchange a CPU build of another version for the CUDA build of the one in constraints.txt."""
    lines = script.constraints(tmp_path, "2.15.0+cpu")
    assert "torch==2.15.0+cpu" in lines and not any(line.startswith("triton") for line in lines)
    assert sum(line.startswith("torch==") for line in lines) == 1
    assert "torch==2.13.0" in script.constraints(tmp_path, None)
    with pytest.raises(script.Failure, match="has torch 2.9.1, which is not >=2.11,<2.16"):
        script.constraints(tmp_path, "2.9.1")
    assert script.in_range("2.12.0a0+nv26.1", ">=2.11,<2.16") and not script.in_range("2.16.0", ">=2.11,<2.16")


def copy_of_checkout(repository: Path, folder: Path) -> Path:
    """Another checkout, as far as the checks look at one."""
    for name in ("scripts", "sepllm_train"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "setup.py", folder / "setup.py")
    return folder


def start(script: Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script as a user starts it, with the folder `path` before what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != requirements.ANY_VERSION}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, str(script), "--help"],
        env=environment | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_scripts_of_another_checkout(repository: Path, tmp_path: Path) -> None:
    other = copy_of_checkout(repository, tmp_path / "other")
    for name in ("pretrain.py", "demo.py"):
        done = start(repository / "scripts" / name, other)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert f"has the checkout {other} installed, and this program is of {repository}" in done.stderr


def test_scripts_look_before_they_import(repository: Path) -> None:
    """But for the report of what is wrong, what runs on a machine's own Python, and modules that are no programs."""
    without = {
        path.name
        for path in (repository / "scripts").glob("*.py")
        if "\nimport check_environment" not in path.read_text()
    }
    assert without == {"env_report.py", "gpu_check.py", "check_environment.py", "install.py"}


def test_benchmarks_check_the_environment_of_their_checkout(repository: Path, tmp_path: Path) -> None:
    """Another checkout that is installed is no problem: benchmarks import the packages that they stand beside."""
    command = [sys.executable, "-m", "benchmarks.plan", "--help"]
    for folder, code in ((copy_of_checkout(repository, tmp_path / "other"), 0), (tmp_path / "site", 2)):
        if code:
            installed(folder, "torch", "2.9.1")
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: torch 2.9.1 is not <2.16,>=2.11: pip install")


def test_the_check_of_a_gpu_needs_no_installation(repository: Path) -> None:
    command = [sys.executable, "-S", "-E", str(repository / "scripts" / "gpu_check.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "--stage" in done.stdout


def installed(folder: Path, package: str, version: str) -> Path:
    """Metadata of an installed package, on a path of their own."""
    place = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("megatron-core", "0.15.3", "megatron-core 0.15.3 is not <0.20,>=0.16.1: pip install 'megatron-core<0.20,"),
        ("megatron-core", "0.20.0", "megatron-core 0.20.0 is not"),
        ("torch", "2.9.1", "torch 2.9.1 is not <2.16,>=2.11: pip install 'torch<2.16,>=2.11'"),
        ("torch", "2.16.0+cpu", "torch 2.16.0+cpu is not"),
    ],
)
def test_versions_outside_the_ranges(repository: Path, tmp_path: Path, package: str, version: str, words: str) -> None:
    path = installed(tmp_path / "site", package, version)
    done = start(repository / "scripts" / "demo.py", path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert words in done.stderr and "SEPLLM_ANY_VERSION=1 tries it as it is" in done.stderr
    assert start(repository / "scripts" / "demo.py", path, SEPLLM_ANY_VERSION="1").returncode == 0
    assert start(repository / "scripts" / "demo.py", path, LOCAL_RANK="1").stderr == ""


def test_a_vendors_build_before_the_release_counts_as_the_release(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(installed(tmp_path, "torch", "2.11.0a0+eb65b36.nv26.2")))
    assert requirements.unmet(["torch>=2.11,<2.16"]) == []


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "declared", lambda: requirements.Declared(RANGE, ["no-such-package>=3"]))
    assert requirements.problem() == "no-such-package is missing: pip install 'no-such-package>=3'."


@pytest.mark.parametrize(
    ("version", "words"),
    [((3, 10, 13), "Python 3.10.13 is too old: use 3.11 to 3.13."), ((3, 11, 0), None), ((3, 13, 9), None),
     ((3, 14, 0), "Python 3.14 is not tested yet: use 3.11 to 3.13.")],
)  # fmt: skip
def test_version_of_the_interpreter(version: tuple[int, ...], words: str | None) -> None:
    assert requirements.python_problem(version, RANGE) == words
    assert requirements.python_problem(version, "<3.14,>=3.11") == words  # as a wheel's metadata have it


def test_an_old_interpreter_gets_the_sentence(repository: Path, tmp_path: Path) -> None:
    """The files up to the sentence parse with an old grammar."""
    import ast

    for name in ("scripts/check_environment.py", "sepllm_train/requirements.py", "scripts/pretrain.py"):
        ast.parse((repository / name).read_text(), feature_version=(3, 7))


def test_report_names_an_unsuitable_interpreter(tmp_path: Path) -> None:
    found = facts(tmp_path, tmp_path)
    found["python"]["version"] = "3.14.0"
    assert "Python 3.14 is not tested yet: use 3.11 to 3.13." in advice(found)
