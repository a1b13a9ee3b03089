# SPDX-License-Identifier: Apache-2.0
"""Rules that hold over the whole tree: what may include what, what must be where, what docs say."""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slope_ext
from slope_ext import _library, ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")])
FAMILIES = sorted(p.stem for p in (ROOT / "slope_ext" / "ops").glob("[a-z]*.py"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def schemas():
    """Names of the ops that csrc/library.cpp defines."""
    text = (CSRC / "library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def includes(path, seen=None):
    """Every header that a source includes, those of csrc/ followed."""
    seen = set() if seen is None else seen
    for name in INCLUDE.findall(path.read_text()):
        if name not in seen:
            seen.add(name)
            if (CSRC / name).exists():
                includes(CSRC / name, seen)
    return seen


# ---- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_source_includes_no_torch_header(source):
    """Kernels compile fast and do not depend on a torch release."""
    torch_headers = [n for n in includes(source) if re.match(r"(torch|ATen|c10|caffe2)/", n)]
    assert not torch_headers


def test_includes_are_followed():
    """The rule above would see a torch header behind one of ours."""
    assert "torch/csrc/stable/tensor.h" in includes(CSRC / "ops" / "compress.cpp")


def test_torch_stable_is_the_only_door():
    """Of our own files only csrc/common/torch_stable.h includes torch headers."""
    for source in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")]:
        if source.name != "torch_stable.h":
            assert not [n for n in INCLUDE.findall(source.read_text()) if n.startswith("torch/")]


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_kernels_wait_for_the_kernel_before(source):
    """A kernel may be launched to start early, and so has to wait (csrc/common/launch.cuh)."""
    text = re.sub(r"//.*", "", source.read_text())
    assert "<<<" not in text
    assert not re.search(r"__ldg|ld\.global\.nc", text)
    for kernel in text.split("__global__")[1:]:
        head, body = kernel.split("{", 1)
        assert "__restrict__" not in head
        body = body[: body.index("\n}")]
        waits = "  wait_for_previous_kernel();\n  let_next_kernel_start();\n"
        assert body.count(waits) == 1, head
        assert "return" not in body[: body.index("wait_for_previous_kernel")], head


def test_every_cuda_source_is_built():
    text = (ROOT / "CMakeLists.txt").read_text()
    for source in [*(CSRC / "ops").glob("*.cu"), *(CSRC / "ops").glob("*.cpp")]:
        assert source.relative_to(ROOT).as_posix() in text


# ---- ops -----------------------------------------------------------------------------------------


def test_ops_are_those_of_the_library():
    assert sorted(schemas()) == sorted(_library.OPS)
    assert len(set(schemas())) == len(schemas())


@pytest.mark.parametrize("name", schemas())
def test_op_has_public_function_and_is_documented(name):
    assert name in ops.__all__
    function = getattr(ops, name)
    assert function.__doc__
    assert "Raises:" in function.__doc__
    assert f"`{name}(" in (ROOT / "docs" / "design.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_op_family_has_a_test_file(family):
    assert (ROOT / "tests" / f"test_{family}.py").is_file()


# ---- op library ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undefined_symbols():
    """[(kind, name)] that the op library takes from others; kind is U, or w for weak ones."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-DC", "--undefined-only", str(_library._LIBRARY_FILE)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_op_library_uses_the_stable_abi_only(undefined_symbols):
    """No C++ symbol of torch: those change from release to release."""
    assert any(name.startswith("aoti_torch_") for _, name in undefined_symbols)
    pattern = re.compile(r"\b(at|c10|torch|caffe2)::")
    assert not [name for _, name in undefined_symbols if pattern.search(name)]


def test_op_library_links_no_python(undefined_symbols):
    assert not [name for _, name in undefined_symbols if name.startswith(("Py", "_Py"))]


def test_stream_symbol_is_weak(undefined_symbols):
    """torch for the CPU lacks it, and must load the library all the same."""
    kinds = [k for k, name in undefined_symbols if name == "aoti_torch_get_current_cuda_stream"]
    assert kinds == (["w"] if _library.CUDA_KERNELS else [])


# ---- documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE"])
def test_document_exists(name):
    assert (ROOT / name).is_file()


def test_changelog_has_this_version():
    assert f"## [{slope_ext.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/design.md", "docs/layouts.md"])
def test_paths_in_document_exist(name):
    """`csrc/library.cpp` and the like; placeholders in angle brackets are skipped."""
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:csrc|slope_ext|tests|benchmarks|scripts|docs|cmake)/[\w./]*)`", text)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_examples_in_layouts_hold():
    text = (ROOT / "docs" / "layouts.md").read_text()
    blocks = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    examples = doctest.DocTestParser().get_doctest("".join(blocks), {}, "layouts.md", None, 0)
    assert len(examples.examples) > 20
    report = []
    results = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert results.failed == 0, "".join(report)


def test_env_report_runs():
    command = [sys.executable, "-m", "slope_ext.env_report"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    versions, advice = result.stdout.rsplit("\n\n", 1)
    assert re.search(rf"^slope_ext +{re.escape(slope_ext.__version__)}$", versions, re.MULTILINE)
    for word in ("python", "torch", "built against", "compiler", "cuSPARSELt"):
        assert re.search(rf"^{word} +\S", versions, re.MULTILINE)
    for name in _library.OPS:
        assert re.search(rf"^op {name} +\S", versions, re.MULTILINE)
    assert advice.strip()


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.slow
def test_wheel_holds_everything_and_works_elsewhere(tmp_path):
    """Built without isolation, installed without dependencies, used from another directory."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    program = (
        "import pathlib, torch, slope_ext as s; "
        "assert s.__file__.startswith(str(pathlib.Path('site').resolve())); "
        "assert s.convert(torch.nn.Linear(16, 16))(torch.ones(1, 16)).shape == (1, 16); "
        "from slope_ext.recipes.data import DEMO_TEXT as d; assert len(list(d.glob('*.txt'))) > 9; "
        "assert list(pathlib.Path(s.__file__).with_name('tuned').glob('*.json'))"
    )
    environment = os.environ | {"PYTHONPATH": "site"}
    run = [sys.executable, "-c", program]
    subprocess.run(run, check=True, cwd=tmp_path, env=environment, capture_output=True)


def test_readme_tables_are_what_the_records_say():
    plot = [sys.executable, str(ROOT / "benchmarks" / "plot.py"), "--check"]
    assert subprocess.run(plot, check=False).returncode == 0
