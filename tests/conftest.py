"""What tests share: tiny random models, made once per run, and a device for captured graphs that needs no GPU."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime.devices.webgpu import SOFTWARE, webgpu_problem
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.telemetry import decline_telemetry
from dovetail.runtime.tree.limits import TreeLimits

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

decline_telemetry()  # tests use no network

SWIFTSHADER = Path(os.environ.get("DOVETAIL_SWIFTSHADER", Path(__file__).parents[1] / ".cache" / "swiftshader"))


def use_swiftshader() -> None:
    """Let Vulkan find SwiftShader, before any test loads the WebGPU plugin: it reads the variable only then."""
    loader, driver = SWIFTSHADER / "libvulkan.so.1", SWIFTSHADER / "vk_swiftshader_icd.json"
    if loader.exists() and driver.exists():
        os.environ["VK_DRIVER_FILES"], os.environ[SOFTWARE] = str(driver), "1"
        ctypes.CDLL(str(loader))  # a later load by name finds it


use_swiftshader()

gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def collected_heap() -> None:
    """Let the garbage collector skip what lives on, above all the modules of torch and transformers.

    Its walks over them otherwise take a third of the time of an export.
    """
    gc.collect()
    gc.freeze()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def bench_script() -> Callable[[str], ModuleType]:
    """Imports a script of tests/bench by its name."""
    return lambda name: imported(f"bench_{name}", Path(__file__).parent / "bench" / f"{name}.py")


@pytest.fixture(scope="session")
def dflash() -> ModuleType:
    """Writes DFlash checkpoints and computes their forward: tests/models/dflash_reference.py."""
    return imported("dflash_reference", Path(__file__).parent / "models" / "dflash_reference.py")


def imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A server of this test that answers as the Hugging Face Hub does."""
    pytest.importorskip("huggingface_hub", reason="the Hub is the exporter's")
    module = sys.modules.get("fake_hub") or imported("fake_hub", Path(__file__).parent / "fake_hub.py")
    with module.FakeHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama of width 32 with 2 layers, random weights, a byte-level tokenizer."""
    from dovetail.exporter.build.progress import quiet

    folder = tmp_path_factory.mktemp("tiny_llama")
    with quiet():
        import torch
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
        tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("t", "h")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(folder)

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(pieces) + 6,  # padded, as real vocabularies are
            max_position_embeddings=256,
            bos_token_id=len(pieces),
            eos_token_id=len(pieces) + 1,
            tie_word_embeddings=False,
            initializer_range=0.5,  # random logits that are not all alike
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair folder (INT8 target, no drafter) that `dovetail-export target` makes of `tiny_llama`: read only."""
    from dovetail.exporter.target.export import export_target

    pair = tmp_path_factory.mktemp("exported") / "tiny"
    export_target(str(tiny_llama), pair)
    return pair


@pytest.fixture(scope="session")
def tiny_target(tiny_pair: Path) -> Path:
    """The `target` folder of `tiny_pair`, an INT8 IR with the feature tap: read only."""
    return tiny_pair / "target"


@pytest.fixture(scope="session")
def optimum_ir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an IR of `tiny_llama` by `optimum-cli export openvino` with these arguments."""
    from dovetail.exporter.build.progress import quiet

    def make(*arguments: str) -> Path:
        folder = tmp_path_factory.mktemp("optimum") / "ir"
        model = ["-m", str(tiny_llama), "--task", "text-generation-with-past"]  # local folders must name their task
        before, sys.argv = sys.argv, ["optimum-cli", "export", "openvino", *model, *arguments, str(folder)]
        try:
            with quiet():
                from optimum.commands.optimum_cli import main

                main()
        finally:
            sys.argv = before
        return folder

    return make


@pytest.fixture(scope="session")
def plain_ir(optimum_ir: Callable[..., Path]) -> Path:
    """What `optimum-cli export openvino --weight-format int8` makes of `tiny_llama`: read only."""
    return optimum_ir("--weight-format", "int8")


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights and the tokenizer of `tiny_llama` as a GGUF file, as llama.cpp's converter lays them out."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((tiny_llama / "config.json").read_text())
    tokens = json.loads((tiny_llama / "tokenizer.json").read_text())
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = {**tokens["model"]["vocab"], **{t["content"]: t["id"] for t in tokens["added_tokens"]}}
    names = sorted(vocabulary, key=lambda token: vocabulary[token])
    padding = config["vocab_size"] - len(names)
    special = len(tokens["added_tokens"])
    kinds = [gguf.TokenType.NORMAL] * (len(names) - special) + [gguf.TokenType.CONTROL] * special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * padding)
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        short = mapping.get_name(name, try_suffixes=(".weight",))
        assert short is not None
        if count := heads.get(short.split(".")[-2]):  # llama.cpp interleaves the two halves of the rotation
            rows, width = tensor.shape
            tensor = tensor.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)
        writer.add_tensor(short, tensor.astype("float32").copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_drafter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random drafter checkpoint for `tiny_llama`: gated fusion, one block, 64 draft tokens."""
    import torch

    from dovetail.models.config import DrafterConfig
    from dovetail.models.drafter import Drafter
    from dovetail.models.formats.dovetail import save_checkpoint

    torch.manual_seed(0)
    target = json.loads((tiny_llama / "config.json").read_text())
    config = DrafterConfig.for_target(target, draft_vocab_size=64, fusion="dgf", blocks=1)
    rows = torch.randn(config.vocab_size, config.hidden_size)
    d2t = torch.arange(config.draft_vocab_size) * 2
    folder = tmp_path_factory.mktemp("drafter")
    save_checkpoint(Drafter(config, rows, rows[d2t], d2t), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_full_pair(tiny_pair: Path, tiny_drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pair` with `tiny_drafter` added: read only."""
    from dovetail.exporter.pairs.pair import add_drafter

    pair = tmp_path_factory.mktemp("full") / "tiny"
    shutil.copytree(tiny_pair, pair)
    add_drafter(tiny_drafter, pair)
    return pair


@pytest.fixture(scope="session")
def soft_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with smaller weights, a larger head and context: INT8 errs as little as with trained weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("soft") / "llama"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama, initializer_range=0.2, max_position_embeddings=1024)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_pair(soft_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose drafter is a copy of its own target, a language model, added by the command line: read only."""
    from dovetail.exporter.cli.main import main
    from dovetail.exporter.target.export import export_target

    pair = tmp_path_factory.mktemp("language") / "tiny"
    export_target(str(soft_llama), pair)
    assert main(["drafter", str(pair), "--checkpoint", str(soft_llama)]) == 0
    return pair


@pytest.fixture(scope="session")
def tiny_dflash(tiny_pair: Path, dflash: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DFlash checkpoint for `tiny_llama`: blocks of 6, one layer of two with a window.

    Its draft vocabulary is what the target writes, so that some drafted tokens are right.
    """
    from dovetail.runtime.engine import Engine

    with Engine.from_pretrained(tiny_pair, tree=TreeLimits(lookup=0)) as engine:
        text = engine.generate("the quick brown fox", 60, raw=True).token_ids
    flags = dflash.Flags(
        vocabulary=263, depth=2, taps=(0,), block=6, mask=262, sliding=(False, True), window=40,
        kept=tuple(sorted(set(text))), seed=5,
    )  # fmt: skip
    return dflash.write(tmp_path_factory.mktemp("dflash"), flags)


@pytest.fixture(scope="session")
def dflash_pair(tiny_pair: Path, tiny_dflash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pair` with `tiny_dflash` added by the command line: read only."""
    from dovetail.exporter.cli.main import main

    pair = shutil.copytree(tiny_pair, tmp_path_factory.mktemp("dflash_pair") / "tiny")
    assert main(["drafter", str(pair), "--checkpoint", str(tiny_dflash)]) == 0
    return pair


Bytes = NDArray[np.uint8]


class HostDevice:
    """Device of cuda_runner on host memory, with ONNX Runtime's CPU provider: the same buffers and order of calls.

    A copy down is done by `wait`, as late as a GPU may do it.
    room: bytes that can be allocated.  fail_at: number of the first `wait` that raises, 0 for none.  alter: is handed
    what comes down, to spoil it.  deaf: what is uploaded after the first time does not arrive.  captures, launches:
    whether it takes a session that captures its calls, and one that does not.
    """

    kind = "cpu"

    def __init__(
        self,
        *,
        provider: str = "CPUExecutionProvider",
        room: int | None = None,
        fail_at: int = 0,
        alter: Callable[[Bytes], None] | None = None,
        deaf: bool = False,
        captures: bool = True,
        launches: bool = True,
    ):
        self.takes = {True: captures, False: launches}
        self.provider, self.room, self.fail_at, self.alter, self.deaf = provider, room, fail_at, alter, deaf
        self.blocks: dict[int, Bytes] = {}
        self.queue: list[tuple[Bytes, int]] = []
        self.calls: list[str] = []
        self.arena: int | None = None
        self.closed = False

    def provider_options(self, arena: int | None, *, capture: bool = True) -> dict[str, str]:
        self.arena = arena
        if not self.takes[capture]:
            raise DeviceError("This session cannot use the graph capture feature" if capture else "no kernel image")
        return {}

    def memory(self) -> tuple[int, int]:
        return 3 << 30, 4 << 30

    def allocate(self, size: int) -> int:
        if self.room is not None and size + sum(block.nbytes for block in self.blocks.values()) > self.room:
            raise DeviceError(f"cudaMalloc: out of memory (code 2) for {size} bytes")
        block = np.zeros(size, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def clear(self, address: int, size: int) -> None:
        assert size <= self.blocks[address].nbytes, "zeros past their block"
        self.blocks[address][:size] = 0

    def pinned(self, size: int) -> Bytes:
        return np.zeros(size, np.uint8)

    def upload(self, to: int, source: Bytes) -> None:
        assert source.nbytes <= self.blocks[to].nbytes, "a copy up past its block"
        self.calls.append("up")
        if self.deaf and self.calls.count("up") > 1:
            return
        ctypes.memmove(to, source.ctypes.data, source.nbytes)

    def download(self, to: Bytes, source: int) -> None:
        assert to.nbytes <= self.blocks[source].nbytes, "a copy down past its block"
        self.calls.append("down")
        self.queue.append((to, source))

    def wait(self) -> None:
        self.calls.append("wait")
        if 0 < self.fail_at <= self.calls.count("wait"):  # what failed stays so
            raise DeviceError("cudaStreamSynchronize: an illegal memory access was encountered (code 700)")
        for to, source in self.queue:
            ctypes.memmove(to.ctypes.data, source, to.nbytes)
            if self.alter:
                self.alter(to)
        self.queue = []

    def close(self) -> None:
        self.closed = True
        for block in self.blocks.values():
            block.fill(0xFF)  # nobody may look at it any more


@pytest.fixture(name="HostDevice")
def host_device() -> type[HostDevice]:
    return HostDevice


@pytest.fixture(scope="session")
def swiftshader() -> None:
    """A Vulkan driver for the WebGPU plugin that needs no GPU. Skips the test where there is none."""
    if not (SWIFTSHADER / "libvk_swiftshader.so").exists():
        pytest.skip(f"no SwiftShader in {SWIFTSHADER}: run .ci/swiftshader {SWIFTSHADER}")
    assert webgpu_problem(software=True) is None
