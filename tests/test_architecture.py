"""The layers: imports go one way, optional packages are optional, importing is cheap."""

import ast
import importlib.util
import io
import re
import resource
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import convexbn

PACKAGE = Path(convexbn.__file__).parent
CHECKOUT = Path(__file__).parents[1]

#: A module or package may import from earlier lines and from within itself.
LAYERS = [
    ["_types", "_threads", "_version"],
    ["data", "companions"],
    ["program"],
    ["bounds", "files"],
    ["certificate", "solvers"],
    ["training"],
    ["estimators"],
    ["nn"],
    ["cli"],
    ["__main__"],
]
ALONE = ["_types", "_threads", "files.atomic", "files.model_file", "files.dataset", "files.tables", "files.datasets"]
OPTIONAL = ["matplotlib", "clarabel", "pyarrow", "torch", "PIL", "onnx"]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imported(path, *, everywhere=True):
    """Modules that a file imports, in full; with ``everywhere`` also inside of functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path):
    """Modules of the package that a file imports, without the prefix."""
    known = {name for name, _ in modules()}
    return known & {name.removeprefix("convexbn.") for name in imported(path) if name.startswith("convexbn.")}


def group(name):
    return name.split(".")[0]


def test_every_module_has_its_layer():
    listed = {name for layer in LAYERS for name in layer} | {"__init__"}
    assert {group(name) for name, _ in modules()} == listed


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_go_one_way(layer):
    below = {name for names in LAYERS[:layer] for name in names}
    for name, path in modules():
        if group(name) in LAYERS[layer]:
            backwards = {group(other) for other in own(path)} - below - {group(name)}
            assert not backwards, f"{name} imports {sorted(backwards)}"


def test_no_two_modules_need_one_another():
    """Within packages too: imports at the top of files have no circle."""
    needs = {name: {m.removeprefix("convexbn.") for m in imported(path, everywhere=False)} for name, path in modules()}
    needs = {name: (others & set(needs)) - {name, group(name)} for name, others in needs.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def functions():
    """Place, node and source of every function."""
    for name, path in modules():
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node, source


def code_lines(node, source):
    """Lines of a function with code on them: no docstring, comment or blank."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    skipped = range(docstring.lineno, docstring.end_lineno + 1) if docstring else ()
    text = "\n".join(source.splitlines()[: node.end_lineno]) + "\n"
    void = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in void:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len([line for line in lines if node.lineno <= line <= node.end_lineno and line not in skipped])


def test_the_house_has_eleven_rooms_and_a_small_hall():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {name for layer in LAYERS for name in layer if not name.startswith("_")} and len(rooms) == 11
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 6


def test_no_two_classes_have_one_name():
    trees = [ast.parse(path.read_text()) for _, path in modules()]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_fit_a_screen():
    found = ((place, code_lines(node, source)) for place, node, source in functions() if len(node.body) > 3)
    assert [(place, count) for place, count in found if count > 40] == []


def test_functions_take_few_parameters():
    """A program is an object: nobody carries rows, loss and weight decay by hand."""
    for place, node, _ in functions():
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(names) <= 8, f"{place} takes {names}"
        assert not {"rows", "loss", "weight_decay"} <= set(names), place


def test_saved_models_know_no_estimator():
    for name in ("persistence", "persistence_header", "path_checkpoint"):
        found = set(imported(PACKAGE / "estimators" / f"{name}.py"))
        assert not found & {f"convexbn.estimators.{kind}" for kind in ("base", "classifier", "regressor", "path")}


@pytest.mark.parametrize("name", ALONE)
def test_modules_that_stand_alone_import_nothing_of_ours(name):
    for module, path in modules():
        if f"{module}.".startswith(f"{name}."):
            assert all(
                f"{other}.".startswith(f"{name}.") or other in (group(name), "files.atomic", "files.dataset")
                for other in own(path)
            )


def test_the_judge_knows_no_solver():
    files, seen = dict(modules()), set()
    todo = [name for name in files if group(name) == "certificate"]
    while todo:
        name = todo.pop()
        seen.add(name)
        todo += own(files[name]) - seen
    assert not {group(name) for name in seen} & {"solvers", "path", "training", "estimators"}


def test_solvers_do_not_know_the_judge():
    for name, path in modules():
        if group(name) == "solvers":
            assert "certificate" not in map(group, own(path)), name


def test_the_annex_is_imported_by_its_command_alone():
    for name, path in modules():
        annex = {module for module in imported(path) if module.startswith("convexbn_studies")}
        assert not annex or name == "cli.reproduce", name
        assert not annex & set(imported(path, everywhere=False)), name


def test_optional_packages_are_imported_inside_functions_alone():
    for name, path in modules():
        heads = {module.split(".")[0] for module in imported(path, everywhere=False) if module}
        allowed = {"torch"} if group(name) in ("nn", "companions") else set()  # classes of theirs are modules of torch
        assert not heads & {*OPTIONAL, "rich", "joblib", "pandas", "polars"} - allowed, name


def test_the_command_line_loads_what_a_command_needs_with_the_command():
    files, seen, todo = dict(modules()), set(), ["__init__", "__main__", "cli"]
    while todo:
        name = todo.pop()
        seen.add(name)
        found = set(imported(files[name], everywhere=False))
        heads = {module.split(".")[0] for module in found}
        assert not heads & {"sklearn", "scipy", "numpy", "safetensors"}, name
        todo += ({module.removeprefix("convexbn.") for module in found} & set(files)) - seen
    assert {"cli.fit", "cli.options", "cli.output"} <= seen


BLOCKED = """
import importlib.abc, os, sys
import numpy as np
import scipy.linalg  # what stays imported, and needs none of the packages

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def expect(error, words, function):
    try:
        function()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(words)

def work(package):
    import convexbn
    from convexbn.cli import main
    from convexbn.estimators.display import CertificateDisplay

    X = np.random.default_rng(0).standard_normal((30, 3))
    model = convexbn.ConvexBNRegressor(n_gates=10, random_state=0).fit(X, X[:, 0] ** 2)
    assert model.certificate_.status == "CERTIFIED" and model.predict(X).shape == (30,)
    expect(SystemExit, "0", lambda: main(["--help"]))
    if package == "clarabel":
        conic = convexbn.ConvexBNRegressor(solver="conic", n_gates=10)
        expect(ImportError, "pip install 'convexbn[reference]'", lambda: conic.fit(X, X[:, 0]))
    if package == "matplotlib":
        expect(ImportError, "matplotlib", CertificateDisplay.from_estimator(model).plot)
    if package == "pyarrow":
        open("empty.parquet", "w").close()
        assert main(["fit", "empty.parquet", "--target", "y", "--out", "m"]) == 1

for package in sys.argv[1:]:
    if os.fork() == 0:
        assert package not in sys.modules, package
        blocker = Blocker()
        blocker.package = package
        sys.meta_path.insert(0, blocker)
        work(package)
        print("worked without", package)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_without_each_optional_package_the_rest_works(tmp_path):
    command = [sys.executable, "-c", BLOCKED, *OPTIONAL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stdout.splitlines() if "worked" in line] == [
        f"worked without {package}" for package in OPTIONAL
    ], done.stderr[-1500:]
    assert done.stdout.count("fit | predict | certify | path") >= len(OPTIONAL)
    assert "pip install convexbn[data]" in done.stderr.replace("'", "") and not (tmp_path / "m").exists()


def cpu_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "command", [["-c", "import convexbn"], ["-m", "convexbn", "--help"], ["-c", "import convexbn.cli"]], ids=str
)
def test_importing_and_helping_are_cheap(command):
    seconds = min(cpu_seconds(*command) for _ in range(3))
    assert seconds < 0.3, f"{seconds:.2f} CPU s"


@pytest.mark.parametrize("statement", ["import convexbn", "from convexbn.cli import _parser; _parser().format_help()"])
def test_importing_does_not_load_the_heavy_packages(statement):
    script = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"sklearn", "scipy", "numpy", "torch", "matplotlib", "rich", "pandas", "pyarrow"}
    assert not heavy & set(done.stdout.split())


def scripts():
    """Examples and benchmarks of a checkout."""
    return sorted([*CHECKOUT.glob("examples/*.py"), *CHECKOUT.glob("benchmarks/*.py")])


def patched_names():
    """Module and name of everything of ours that tests patch in a module."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        tree, places = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                places |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("monkeypatch.setattr", "patch.setattr"):
                target, *name = (ast.unparse(argument) for argument in node.args)
                if isinstance(node.args[0], ast.Constant):
                    where, _, what = node.args[0].value.rpartition(".")
                else:
                    first, *rest = re.sub(r"import_module\('(.*)'\)", r"\1", target).split(".")
                    where, what = ".".join([places.get(first, first), *rest]), name[0].strip("'")
                yield where, what


def test_what_tests_patch_is_read():
    """A constant that has moved would disarm the test that patches it."""
    files, seen = {f"convexbn.{name}": path for name, path in modules()}, 0
    asked_for = {name for path in files.values() for name in imported(path)}
    for where, what in patched_names():
        if where in files:
            nodes = ast.walk(ast.parse(files[where].read_text()))
            read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            assert what in read or f"{where}.{what}" in asked_for, f"{where} does not read {what}"
            seen += 1
    assert seen >= 45


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_examples_and_benchmarks_import_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "convexbn":
            for alias in node.names:
                module = importlib.import_module(node.module)
                named = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert named, f"{node.module} has no {alias.name}"


def test_public_names_resolve_and_others_do_not():
    assert all(getattr(convexbn, name) is not None for name in convexbn.__all__)
    assert dir(convexbn) == sorted(convexbn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = convexbn.nonsense


def test_the_citation_has_the_required_keys():
    path = CHECKOUT / "CITATION.cff"
    if not path.exists():
        return
    text = path.read_text()
    assert "\t" not in text
    top = dict(re.findall(r"^([a-z-]+):[ ]*(.*)$", text, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors"} <= set(top)
    assert re.fullmatch(r"[\"']?1\.2\.0[\"']?", top["cff-version"])
    assert top.get("version", convexbn.__version__).strip("\"'") == convexbn.__version__
    assert re.search(r"^authors:\n\s+- \S", text, re.MULTILINE) and (top["message"] and top["title"])
