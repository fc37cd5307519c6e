"""What a model's name may be: folders, GGUF files converted once, hub ids, registered names."""

import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from qwenlib import assets
from qwenlib.model import load_pretrained, sources
from qwenlib.model.gguf import load_gguf
from qwenlib.model.sources import resolve_model
from qwenlib.tokenizer import Tokenizer, encode_chat
from tests.model.gguf_files import metadata_of, random_model, tensors_of, write_gguf
from tests.tokenizer.test_gguf import smol_keys

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QWENLIB_CACHE", str(tmp_path / "cache"))
    for switch in ("QWENLIB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    return tmp_path / "cache"


def save(path, seed=0, rows=None):
    rows = rows or len(smol_keys()["tokenizer.ggml.tokens"])
    model = random_model("llama", seed, vocab_size=rows, tie_word_embeddings=True)
    tensors = tensors_of("llama", model.config, model.state_dict(), "Q8_0")
    return write_gguf(path, "llama", metadata_of(model.config), tensors, general=smol_keys())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()  # what lies here goes before a registered name
    assert resolve_model("smollm2-135m").resolve() == tmp_path / "smollm2-135m"


def test_gguf_file_becomes_a_folder_once(tmp_path, cache, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save(tmp_path / "tiny.gguf")
    folder = resolve_model(path)
    assert folder.is_relative_to(cache / "gguf")
    assert same(load_pretrained(path), load_gguf(path))
    tokenizer, text = Tokenizer.from_pretrained(folder), "In 2024  12 cats\n don't"
    assert tokenizer.encode(text) == Tokenizer.from_gguf(path).encode(text)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = encode_chat(tokenizer, QUESTION)[0]
    with torch.no_grad():
        ours = load_pretrained(folder).eval()(torch.tensor([ids]))
        assert (ours - theirs(torch.tensor([ids])).logits).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer.encode(text)
    assert theirs.generation_config.pad_token_id == tokenizer.pad_token_id
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_convert", None)
        assert resolve_model(str(path)) == folder
    assert {entry.name for entry in folder.parent.iterdir()} == {".convert.lock", folder.name}


def test_a_changed_file_is_converted_again(tmp_path):
    path = save(tmp_path / "tiny.gguf")
    first = resolve_model(path)
    os.utime(path, ns=(1, 1))
    assert resolve_model(path) != first
    save(path, seed=1)
    assert same(load_pretrained(path), load_gguf(path))
    assert not same(load_pretrained(path), load_pretrained(first))
    (tmp_path / "other").mkdir()
    other = save(tmp_path / "other" / "tiny.gguf", seed=2)
    assert same(load_pretrained(other), load_gguf(other))


KILLED = """
import os, sys
from qwenlib.model import checkpoint, sources
real = checkpoint.save_pretrained
def save(*args):
    real(*args)
    os._exit(9)  # all is written, and the folder not yet in its place
checkpoint.save_pretrained = save
sources.resolve_model(sys.argv[1])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path, cache):
    path = save(tmp_path / "tiny.gguf")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == 9
    home = next((cache / "gguf").iterdir())
    leftovers = [entry.name for entry in home.iterdir() if entry.is_dir()]
    assert leftovers and all(name.startswith(".convert-") for name in leftovers)
    assert same(load_pretrained(path), load_gguf(path))
    assert [entry.name[:3] for entry in home.iterdir() if entry.is_dir()] == ["hf-"]


def test_two_processes_convert_once(tmp_path):
    path = save(tmp_path / "tiny.gguf")
    code = (
        "import sys, qwenlib.model.sources as s; real = s._convert\n"
        "def count(*args):\n    print('converted'); real(*args)\n"
        "s._convert = count; print(s.resolve_model(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = "".join(run.communicate()[0] for run in runs).split()
    assert lines.count("converted") == 1
    assert len(set(lines)) == 2
    assert all(run.returncode == 0 for run in runs)


def test_a_file_that_cannot_be_converted(tmp_path, cache):
    path = save(tmp_path / "short.gguf", rows=64)
    with pytest.raises(ValueError, match=r"short.gguf: \d+ tokens .* 64 rows"):
        resolve_model(path)
    assert not any(entry.is_dir() for entry in next((cache / "gguf").iterdir()).iterdir())
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="short.gguf is cut off"):
        resolve_model(path)


def test_a_cache_that_cannot_be_written(tmp_path, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(
        assets.AssetError, match=r"tiny.gguf: cannot write .*\nFix: .*QWENLIB_CACHE"
    ):
        resolve_model(save(tmp_path / "tiny.gguf"))


def test_a_registered_name_is_an_asset(tmp_path, monkeypatch):
    path = save(tmp_path / "asset.gguf")
    monkeypatch.setattr(assets, "fetch", lambda name: path if name in assets.ASSETS else None)
    folder = resolve_model("smollm2-135m")
    assert folder.parent == tmp_path  # beside the file
    assert same(load_pretrained("smollm2-135m"), load_gguf(path))
    assert Tokenizer.from_pretrained("smollm2-135m").encode("1 2") == (
        Tokenizer.from_gguf(path).encode("1 2")
    )
    assert set(sources.NAMES.values()) <= set(assets.ASSETS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("{}/modle", "{}/model"),
        ("./nothing/here", None),
        ("a/b/c", None),
        ("other.gguf", None),
    ],
)
def test_unknown_sources(name, near, tmp_path):
    (tmp_path / "model").mkdir()
    name, near = name.format(tmp_path), near and near.format(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(name)
    message = str(error.value)
    assert message.startswith(f"there is no model '{name}'")
    assert "a model folder, a .gguf file, a hub id 'owner/name', or a name: smollm2-135m" in message
    assert re.findall(r"\(near: (.*?)\)", message) == ([near] if near else [])


def test_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.safetensors is one file: give its folder"):
        resolve_model(tmp_path / "model.safetensors")


# The hub


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"old weights",
    "original/model.safetensors": b"again",
    "README.md": b"a page",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as snapshot_download asks for."""

    def do_GET(self):
        model, file = "/api/models/some-one/tiny_1.5", self.path.partition("/resolve/")[2]
        if self.path.startswith(model + "/revision/"):
            siblings = ",".join(f'{{"rfilename": "{name}"}}' for name in FILES)
            commit = '"id": "some-one/tiny_1.5", "sha": "' + "0" * 40
            self.answer(200, f'{{{commit}", "siblings": [{siblings}]}}'.encode())
        elif self.path.startswith(model + "/tree/"):
            rows = ",".join(
                f'{{"type": "file", "path": "{name}", "oid": "{i:040x}", "size": {len(content)}}}'
                for i, (name, content) in enumerate(FILES.items())
            )
            self.answer(200, f"[{rows}]".encode())
        elif file:
            name = file.partition("/")[2]
            self.answer(200, FILES[name], f'"{list(FILES).index(name):040x}"')
        else:
            self.answer(404, b"", error="RepoNotFound")

    do_HEAD = do_GET

    def answer(self, status, content, etag='"x"', error=""):
        self.send_response(status)
        headers = {"Content-Length": len(content), "ETag": etag, "X-Repo-Commit": "0" * 40}
        for key, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """Runs resolve_model in a process of its own, with a hub on this machine; gives its output."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from qwenlib.model.sources import resolve_model as r\n"
    code += "try: print(r(sys.argv[1], weights=sys.argv[2] == 'all'))\n"
    code += "except Exception as e: print(type(e).__name__, e)"
    set_here = {
        "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip

    def resolve(name, what="all", **variables):
        command = [sys.executable, "-c", code, name, what]
        environment = {**os.environ, **set_here, **variables}
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    yield resolve
    server.shutdown()


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.slow
def test_hub(hub, tmp_path):
    from pathlib import Path

    name = "some-one/tiny_1.5"
    offline = hub(name, HF_HUB_OFFLINE="1")
    assert "FileNotFoundError there is no folder some-one/tiny_1.5, and the hub" in offline
    assert "HF_HUB_OFFLINE is set" in offline and "Fix: unset it" in offline
    assert "QWENLIB_OFFLINE is set" in hub(name, QWENLIB_OFFLINE="1")
    folder = Path(hub(name, "tokenizer"))
    assert names(folder) == {"config.json", "tokenizer.json"}
    assert Path(hub(name)) == folder
    assert names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub(name, QWENLIB_OFFLINE="1") == str(folder)  # the hub's cache needs no network
    unknown = hub("some-one/else")
    assert "there is no folder some-one/else" in unknown and "Fix: check the name" in unknown


def test_hub_arguments(monkeypatch, tmp_path):
    import huggingface_hub

    seen = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: seen.update(more, name=name)
        or str(tmp_path),
    )  # fmt: skip
    assert resolve_model("Qwen/Qwen2.5-0.5B") == tmp_path
    assert seen["name"] == "Qwen/Qwen2.5-0.5B" and not seen["local_files_only"]
    assert "*.safetensors" in seen["allow_patterns"]
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained("Qwen/Qwen2.5-0.5B")
    assert "*.safetensors" not in seen["allow_patterns"]
    monkeypatch.setenv("QWENLIB_OFFLINE", "1")
    resolve_model("Qwen/Qwen2.5-0.5B")
    assert seen["local_files_only"]


# The real file


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_knows_paris(cache, monkeypatch):
    from qwenlib.generation import generate

    monkeypatch.undo()  # the user's own cache holds the file
    try:
        folder = resolve_model("smollm2-135m")
    except assets.AssetError as error:
        pytest.skip(f"the model cannot be fetched: {str(error).splitlines()[0]}")
    model, tokenizer = load_pretrained(folder).eval(), Tokenizer.from_pretrained("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 + 30 * (576 + 2 * 192)
    prompt, _ = encode_chat(tokenizer, QUESTION, add_generation_prompt=True)
    answer = generate(model, [prompt], 20, eos_ids=(tokenizer.eos_token_id,)).completions[0]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
