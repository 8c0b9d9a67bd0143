"""What no file of ours may contain, read from the syntax trees: rules that no reviewer has to remember."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("broker", "engine", "tiers")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# They run code, or can be made to, while reading data.
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports what data names",
    "hash": "differs from process to process: keys are tiers/block.py's",
    "torch.load": "unpickles: safetensors only",
    "torch.save": "pickles",
    "torch.jit.load": "runs the file's code",
    "torch.package.PackageImporter": "runs the file's code",
    "yaml.load": "makes any object",
    "yaml.unsafe_load": "makes any object",
    "os.system": "a shell",
    "os.popen": "a shell",
    "tempfile.mktemp": "a name that somebody else may take first",
    "jinja2.Environment": "not a sandbox: templates come with models",
    "jinja2.Template": "not a sandbox: templates come with models",
}
# {keyword: the values it may have}; what is not a literal is not allowed either
KEYWORDS = {
    "allow_pickle": {False},
    "trust_remote_code": {False},
    "weights_only": {True},
    "use_safetensors": {True},
    "shell": {False},
    "strict_map_key": {True},
}
MSGPACK_LIMITS = {f"max_{kind}_len" for kind in ("str", "bin", "array", "map", "ext")}
SECRET = ("secret", "digest", "password", "api_key")


def rules_broken(tree: ast.AST) -> list[str]:
    """Line and rule of everything in `tree` that may not be."""
    broken = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                modules = {module, *(f"{module}.{alias.name}" for alias in names)}
            case _:
                modules = set()
        for module in modules:
            if module.partition(".")[0] in FORBIDDEN_MODULES:
                broken.append(f"{node.lineno}: imports {module}")
            if module in FORBIDDEN_CALLS:
                broken.append(f"{node.lineno}: {module}: {FORBIDDEN_CALLS[module]}")
        if isinstance(node, ast.Call):
            broken += _call(node)
    return broken


def _call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    broken = [f"{call.lineno}: {name}: {FORBIDDEN_CALLS[name]}"] if name in FORBIDDEN_CALLS else []
    for keyword in call.keywords:
        allowed = KEYWORDS.get(keyword.arg or "")
        if allowed is not None and getattr(keyword.value, "value", None) not in allowed:
            broken.append(f"{call.lineno}: {ast.unparse(keyword)}")
    given = {keyword.arg for keyword in call.keywords}
    if name.startswith("msgpack.unpack") or name == "msgpack.Unpacker":
        missing = sorted((MSGPACK_LIMITS | {"strict_map_key"}) - given)
        broken += [f"{call.lineno}: {name} without {one}" for one in missing]
    if name.endswith("from_pretrained") and name.startswith("AutoModel"):
        broken += _pretrained(call, given)
    return broken


def _pretrained(call: ast.Call, given: set[str | None]) -> list[str]:
    """Weights come from safetensors, or from a GGUF; their code from nowhere."""
    if given & {"use_safetensors", "gguf_file"}:
        return []
    return [f"{call.lineno}: {ast.unparse(call.func)} without use_safetensors"]


def secrets_compared(tree: ast.AST) -> list[str]:
    """Comparisons that end at the first byte that differs, of something named like a secret."""
    broken = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        telling = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
        sides = [ast.unparse(side).lower() for side in (node.left, *node.comparators)]
        if any(isinstance(op, telling) for op in node.ops) and any(
            word in side for word in SECRET for side in sides
        ):
            broken.append(f"{node.lineno}: {ast.unparse(node)}")
    return broken


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_data_or_trusts_a_hash_of_one_process(file):
    assert rules_broken(ast.parse(file.read_text())) == []


def blind(tree: ast.AST) -> list[str]:
    """Handlers that catch what nobody meant: bare ones, and those of everything."""
    broken = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
            continue  # it only tidies up
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(one) for one in caught if one is not None}
        if node.type is None or names & {
            "Exception",
            "BaseException",
            "trio.Cancelled",
            "BaseExceptionGroup",
        }:
            broken.append(f"{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return broken


def test_only_the_boundary_catches_what_nobody_expected():
    places = {str(file.relative_to(ROOT)): blind(ast.parse(file.read_text())) for file in FILES}
    assert {name for name, found in places.items() if found} == {"broker/boundary.py"}
    assert len(places["broker/boundary.py"]) == 1


@pytest.mark.parametrize(
    "text", ["except:", "except Exception:", "except (OSError, Exception):", "except* Exception:"]
)
def test_the_rule_for_handlers_sees_what_it_is_for(text):
    assert blind(ast.parse(f"try:\n pass\n{text}\n pass"))


def test_secrets_are_compared_in_constant_time_in_one_place():
    """`compare_digest` takes bytes here: text that is not ASCII would be a TypeError, and so an answer."""
    places = [
        (str(file.relative_to(ROOT)), [ast.unparse(argument) for argument in node.args])
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hmac.compare_digest"
    ]
    assert places == [("broker/access.py", ["known", "digest"])]
    assert secrets_compared(ast.parse((ROOT / "broker/access.py").read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(text)",
        "hash(key)",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "from jinja2 import Environment",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=remote)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, use_safetensors=False)",
        "subprocess.run(text, shell=True)",
        "msgpack.unpackb(data)",
        "msgpack.unpackb(data, strict_map_key=False, max_str_len=1, max_bin_len=1, max_array_len=1,"
        " max_map_len=1, max_ext_len=0)",
        "msgpack.Unpacker(file)",
    ],
)
def test_the_rules_see_what_they_are_for(text):
    assert rules_broken(ast.parse(text))


@pytest.mark.parametrize(
    "text", ["found == digest", "digest in known", "key != self._secret", "api_key < other"]
)
def test_the_rule_for_secrets_sees_what_it_is_for(text):
    assert secrets_compared(ast.parse(text))


def test_all_packages_are_looked_at():
    assert len(FILES) > 60
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)
