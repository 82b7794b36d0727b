"""examples/cpp on a GPU: a library for CUDA, in an empty environment, generates what Python generates, by the same graphs."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest
from aot_cases import NEW_TOKENS, PROMPTS, tokens_of

import tvm_infer

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or shutil.which("cmake") is None,
        reason="needs a CUDA device, cmake and a C++ compiler",
    ),
]


def cuda_libraries() -> list[str]:
    """Folders of the CUDA libraries that this process runs on: a deployed program finds them by its LD_LIBRARY_PATH."""
    loaded = re.findall(r"(/\S+/lib(?:cudart|cublasLt|cuda)\.so\S*)", pathlib.Path("/proc/self/maps").read_text())
    return sorted({str(pathlib.Path(path).parent) for path in loaded})


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=131,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # far apart, so that rounding does not choose the token
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model.to(torch.bfloat16)


def with_variant(attention):
    """A decoder whose layers have a variant, of a size that there are kernels for."""
    import variant_models

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WIDTH", 256), ("DIM", 64), ("INV_FREQ", torch.tensor([2.0**-k for k in range(32)]))):
            patch.setattr(variant_models, name, value)
        model = variant_models.decoder(getattr(variant_models, attention))
        return variant_models.exported(model.bfloat16())


@pytest.fixture(scope="module", params=["llama", "Gemma2", "GptOss", "Blocks"])
def cuda_model(request, tmp_path_factory):
    """(a compiled bfloat16 model, the folder it is saved in); a decode step of it takes 4 sequences at most as one graph."""
    torch.manual_seed(0)
    model = llama() if request.param == "llama" else with_variant(request.param)
    executable = tvm_infer.compile(model, target="cuda", max_tokens=32, max_batch=4, cache=False)
    folder = tmp_path_factory.mktemp("cuda")
    executable.save(folder)
    return executable, folder


@pytest.mark.parametrize("count", [1, 3, 6])  # 6: more than a graph takes
def test_tokens_are_python_s(cuda_model, program, tmp_path, count):
    executable, folder = cuda_model
    vocabulary = executable.manifest.vocab_size
    prompts = [[(t + i) % vocabulary for t in PROMPTS[i % 3]] for i in range(count)]
    expected = [g.tokens for g in executable.generate(prompts, max_new_tokens=NEW_TOKENS)]
    (tmp_path / "prompts.txt").write_text("".join(" ".join(map(str, p)) + "\n" for p in prompts))
    path, libraries = program
    files = [str(folder / "model.so"), str(folder / "model.safetensors"), str(tmp_path / "prompts.txt")]
    done = subprocess.run(
        [str(path), *files, "--max-new-tokens", str(NEW_TOKENS)],
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": ":".join([libraries, *cuda_libraries()])},
        check=False,
    )
    assert tokens_of(done) == expected


def test_a_page_size_that_was_not_exported(cuda_model, program, tmp_path):
    _, folder = cuda_model
    (tmp_path / "prompts.txt").write_text("1 2 3\n")
    path, libraries = program
    files = [str(folder / "model.so"), str(folder / "model.safetensors"), str(tmp_path / "prompts.txt")]
    done = subprocess.run(
        [str(path), *files, "--page-size", "32"],
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": ":".join([libraries, *cuda_libraries()])},
        check=False,
    )
    assert done.returncode == 1
    message = (
        r"no kernel `attention_bf16_h64_p32(_v\w{16})?` for sm_90a\. This exported model holds( \w+ for sm_90a,)+ and"
    )
    assert re.search(message, done.stderr), done.stderr


def test_loaded_in_python(cuda_model):
    executable, folder = cuda_model
    loaded = tvm_infer.load(folder)
    prompts = [[t % executable.manifest.vocab_size for t in prompt] for prompt in PROMPTS]
    expected = [g.tokens for g in executable.generate(prompts, max_new_tokens=NEW_TOKENS)]
    assert [g.tokens for g in loaded.generate(prompts, max_new_tokens=NEW_TOKENS)] == expected
