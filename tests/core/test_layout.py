"""The pack's shape: what each part may import, and the files ComfyUI, its registry and its users rely on."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sf_core

ROOT = Path(__file__).resolve().parents[2]
HOST_MODULES = {
    "app", "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution",
    "folder_paths", "latent_preview", "main", "node_helpers", "nodes", "psutil", "server", "utils",
}  # fmt: skip
HOST_OWNED = {"torch", "torchvision", "torchaudio", "xformers", "triton", "sageattention", "flash-attn"}
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml"}
ENGINE = ROOT / "sf_core"
LAYERS = (  # of the engine, the lowest first: each imports from those before it
    {"", "device", "worker", "video", "autoencoders"},  # "": the package itself, which knows its version
    {"wan"},
    {"sampling"},
    {"checkpoints", "tiny", "text_encoder"},
    {"memory"},
    {"pipeline"},
    {"training", "cli"},
    {"__main__"},
)
BESIDE = {  # imports within a layer
    ("autoencoders", "device"),
    ("video", "device"),
    ("text_encoder", "checkpoints"),
    ("cli", "training"),
    ("cli", ""),
}
MOST_PARAMETERS, MOST_LINES = 8, 45


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """wan.model of sf_core/wan/model.py, wan of sf_core/wan/__init__.py."""
    return ".".join(path.relative_to(ENGINE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


ENGINE_MODULES = {module_name(path): path for path in python_files("sf_core")}


def imports(path: Path) -> list[tuple[int, str]]:
    """Every import in a file, in functions too: (leading dots, module)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def outside(path: Path) -> set[str]:
    """Top-level names of the modules a file takes from outside the pack."""
    return {module.split(".")[0] for level, module in imports(path) if level == 0}


def inside(path: Path) -> set[str]:
    """Modules of the engine that a file of it imports, in functions too, as dotted names below sf_core."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*path.relative_to(ENGINE).parts[: -node.level], *filter(None, [node.module])])
            names = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {name if name in ENGINE_MODULES else base for name in names}
    return found


def functions(folder: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(where it stands, its syntax) of every function in a folder, those within others too."""
    for path in python_files(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}", node


def requirement_names(text: str) -> set[str]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in lines if line and not line.startswith("-")}


def project_field(name: str) -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+)"$', text, re.MULTILINE).group(1)


def project_extra(name: str) -> set[str]:
    """Packages of an optional extra."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL).group(1)
    return requirement_names("\n".join(re.findall(r'"(.+?)"', block)))


@pytest.mark.parametrize("path", python_files("sf_core"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_engine_knows_nothing_of_comfyui(path):
    assert not outside(path) & HOST_MODULES


@pytest.mark.parametrize("folder", ["sf_core", "nodes"])
def test_pack_imports_itself_relatively(folder):
    offenders = {path.name for path in python_files(folder) if outside(path) & {"sf_core", "self_forcing"}}
    assert not offenders, "the installed folder may have any name, so `import sf_core` fails inside ComfyUI"


def test_engine_does_not_reach_out_of_its_folder():
    for path in python_files("sf_core"):
        depth = len(path.relative_to(ROOT / "sf_core").parts)
        assert all(level <= depth for level, _ in imports(path)), path


@pytest.mark.parametrize("name", ENGINE_MODULES)
def test_a_part_of_the_engine_imports_lower_ones_alone(name):
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    part = name.split(".")[0]
    for imported in inside(ENGINE_MODULES[name]):
        other = imported.split(".")[0]
        assert other == part or level[other] < level[part] or (part, other) in BESIDE, imported


def test_no_modules_of_the_engine_import_each_other_in_a_circle():
    TopologicalSorter({name: inside(path) - {name} for name, path in ENGINE_MODULES.items()}).prepare()


def test_the_engine_has_few_modules_that_belong_to_no_part():
    alone = {"__init__", "__main__", "device", "memory", "pipeline", "text_encoder", "video", "worker"}
    assert {path.stem for path in ENGINE.glob("*.py")} <= alone


@pytest.mark.parametrize("folder", ["sf_core", "nodes"])
def test_no_function_takes_more_than_eight_things(folder):
    """But a node's `execute`, which is called with its inputs."""
    offenders = []
    for where, node in functions(folder):
        listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        names = [one.arg for one in listed if one is not None and one.arg not in ("self", "cls")]
        if len(names) > MOST_PARAMETERS and not (folder == "nodes" and node.name == "execute"):
            offenders.append(f"{where}: {len(names)}")
    assert not offenders


@pytest.mark.parametrize("folder", ["sf_core", "nodes"])
def test_no_function_is_longer_than_a_page(folder):
    """But lists of a node's inputs, or of a command's options."""
    offenders = []
    for where, node in functions(folder):
        lines = node.end_lineno - node.lineno + 1
        if lines > MOST_LINES and not re.fullmatch("define_schema|_?add_[a-z]+", node.name):
            offenders.append(f"{where}: {lines}")
    assert not offenders


def test_requirements_cover_what_the_pack_imports():
    required = requirement_names((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    allowed = required | HOST_OWNED | HOST_MODULES | set(sys.stdlib_module_names)
    for path in [ROOT / "__init__.py", *python_files("sf_core"), *python_files("nodes")]:
        needed = {DISTRIBUTION.get(name, name).lower() for name in outside(path)}
        extra = project_extra("train") if "training" in path.parts else set()
        assert needed <= allowed | extra, f"{path.relative_to(ROOT)} imports {needed - allowed - extra}"


def test_the_extra_for_training_is_in_the_developers_requirements():
    assert project_extra("train") <= requirement_names((ROOT / "requirements-dev.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_leave_torch_to_comfyui(name):
    assert not requirement_names((ROOT / name).read_text(encoding="utf-8")) & HOST_OWNED


def test_registry_and_manager_install_the_same_requirements():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    assert re.findall(r'"(.+?)"', block) == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


def test_version_is_the_newest_in_the_changelog_and_the_engines():
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert project_field("version") == headings[0] == sf_core.__version__


def test_registry_metadata_is_complete():
    assert project_field("PublisherId") and project_field("DisplayName") and project_field("description")
    assert project_field("requires-comfyui").startswith(">=")
    assert "comfyui" not in project_field("name").lower()


def test_pack_has_what_its_users_need():
    for name in ["__init__.py", "LICENSE", "README.md", "nodes", "sf_core", "web", "locales", "workflows", "subgraphs"]:
        assert (ROOT / name).exists(), name


def test_entry_point_is_the_v3_one():
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert "comfy_entrypoint" in text and "WEB_DIRECTORY" in text
    assert "NODE_CLASS_MAPPINGS" not in text, "ComfyUI would take this and ignore comfy_entrypoint"


def test_every_workflow_is_json_with_a_thumbnail():
    workflows = sorted((ROOT / "workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        assert json.loads(path.read_text(encoding="utf-8"))["nodes"], path.name
        assert path.with_suffix(".jpg").exists(), path.name


def test_built_in_model_stays_small():
    weights = sorted((ROOT / "sf_core" / "tiny" / "weights").glob("*.safetensors"))
    assert weights
    assert sum(path.stat().st_size for path in weights) < 8_000_000


def test_published_archive_leaves_out_nothing_the_pack_needs():
    ignored = {line.strip().strip("/") for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()}
    needed = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "nodes", "sf_core", "web",
              "locales", "workflows", "subgraphs"}  # fmt: skip
    assert not ignored & needed


SOURCES = [
    path
    for folder in ["sf_core", "nodes", "web", "locales", "workflows", "subgraphs", "tests", "scripts", ".ci", ".github"]
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".json", ".js", ".md", ".sh", ".yml", ""} and path.is_file()
]


def test_no_path_of_a_developers_machine():
    private = re.compile(r"(?<![\w.~-])(/(root|home|Users|work|mnt)/\w|[A-Z]:\\\\?Users)")
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]:
        assert not private.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)
