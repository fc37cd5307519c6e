"""The asset registry: where files come from, and what happens when that goes wrong."""

import hashlib
import http.server
import multiprocessing
import os
import re
import threading
import zipfile

import pytest

from qwenlib import assets

CONTENT = b"token rank\n" * 1000


def make_asset(name="toy", content=CONTENT, **fields):
    return assets.Asset(
        name=name,
        filename="toy.txt",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        licence="MIT",
        about="a toy",
        **fields,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache, no network: pip sees only the folder `wheels`, the hub is a closed port."""
    monkeypatch.setenv("QWENLIB_CACHE", str(tmp_path / "cache"))
    for name in ("QWENLIB_OFFLINE", "HF_HUB_OFFLINE", "QWENLIB_SHARED_DATA", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.fixture
def register(monkeypatch):
    def add(asset):
        monkeypatch.setitem(assets.ASSETS, asset.name, asset)
        return asset

    return add


@pytest.fixture
def wheel(tmp_path):
    """Builds the wheel `toy-1.0` around given files."""

    def build(files):
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        info = {
            "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
            "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "toy-1.0.dist-info/RECORD": "",
        }
        path = folder / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**files, **info}.items():
                archive.writestr(name, content)
        return path

    return build


@pytest.fixture
def server():
    """An HTTP server on loopback; `pages` maps a path to (content, announced length)."""
    pages, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path not in pages:
                self.send_error(404)
                return
            content, length = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    httpd.pages, httpd.requests = pages, requests
    httpd.address = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def files_left(asset):
    """What a fetch left in the cache beside its lock."""
    folder = assets.cache_path(asset).parent
    return sorted(p.name for p in folder.rglob("*") if p.name != ".lock") if folder.exists() else []


# --- the registry -------------------------------------------------------------------------------


def test_registry_is_complete_and_well_formed():
    expected = {
        "qwen-vocabulary",
        "gpt2-vocabulary",
        "smollm2-135m-instruct",
        "human-eval",
        "django-locale",
        "chinchilla-runs",
        "steplaw-dense-runs",
        "steplaw-moe-runs",
    }
    assert expected <= set(assets.ASSETS)
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256), name
        assert asset.size > 0 and asset.licence and asset.about and asset.source, name
        if asset.wheel:
            assert re.fullmatch(r"[\w.-]+==[\d.]+", asset.wheel), f"{name}: not an exact pin"
        if asset.hub_repo:
            assert re.fullmatch("[0-9a-f]{40}", asset.hub_revision), f"{name}: a moving revision"
        if asset.url:
            assert re.search("/[0-9a-f]{40}/", asset.url), f"{name}: a moving address"


def test_unknown_name_says_the_nearest():
    with pytest.raises(assets.AssetError, match="did you mean 'qwen-vocabulary'"):
        assets.fetch("qwen-vocab")


# --- the order of places ------------------------------------------------------------------------


def test_own_path_is_taken_as_it_is(tmp_path, register):
    register(make_asset())
    own = tmp_path / "mine.txt"
    own.write_text("something else")
    assert assets.fetch("toy", path=own) == own
    with pytest.raises(assets.AssetError, match=r"no file .*absent.txt"):
        assets.fetch("toy", path=tmp_path / "absent.txt")


def test_cache_comes_before_every_source(register, server):
    asset = register(make_asset(url=server.address + "/toy"))
    target = assets.cache_path(asset)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert assets.fetch("toy") == target
    assert server.requests == []


def test_hub_comes_before_the_wheel_and_the_wheel_before_the_address(
    register, server, wheel, monkeypatch
):
    wheel({"toy/toy.txt": CONTENT})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    hub = "/owner/repo/resolve/abc/toy.txt"
    server.pages[hub] = server.pages["/toy"] = (CONTENT, len(CONTENT))
    asset = register(
        make_asset(
            hub_repo="owner/repo",
            hub_revision="abc",
            hub_path="toy.txt",
            wheel="toy==1.0",
            member="toy/toy.txt",
            url=server.address + "/toy",
        )
    )
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert server.requests == [hub]
    # Without the hub the wheel serves, and the address is still not asked.
    assets.cache_path(asset).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert server.requests == [hub]


def test_hub_without_the_file_falls_through_to_the_wheel(register, server, wheel, monkeypatch):
    wheel({"toy/toy.txt": CONTENT})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    asset = make_asset(
        hub_repo="owner/gone",
        hub_revision="abc",
        hub_path="toy.txt",
        wheel="toy==1.0",
        member="toy/toy.txt",
    )
    register(asset)
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_shared_folder_is_used_when_its_file_is_right(tmp_path, register, server, monkeypatch):
    monkeypatch.setenv("QWENLIB_SHARED_DATA", str(tmp_path))
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    asset = register(make_asset(url=server.address + "/toy", shared_name="shared.csv"))
    (tmp_path / "shared.csv").write_bytes(CONTENT)
    assert assets.fetch("toy") == tmp_path / "shared.csv"
    assert server.requests == []
    (tmp_path / "shared.csv").write_bytes(CONTENT + b"edited")
    assert assets.fetch("toy") == assets.cache_path(asset)
    assert server.requests == ["/toy"]


def test_whole_wheel_can_be_the_asset(register, wheel):
    content = wheel({"toy/a.po": "x"}).read_bytes()
    register(make_asset(content=content, wheel="toy==1.0"))
    with zipfile.ZipFile(assets.fetch("toy")) as archive:
        assert archive.read("toy/a.po") == b"x"


# --- what goes wrong ----------------------------------------------------------------------------


def test_no_network_names_every_place_and_the_fix(register):
    asset = register(
        make_asset(
            hub_repo="owner/repo",
            hub_revision="abc",
            hub_path="toy.txt",
            wheel="toy==1.0",
            member="toy/toy.txt",
            url="http://127.0.0.1:9/toy",
        )
    )
    with pytest.raises(assets.AssetError) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    for part in ("owner/repo", "toy==1.0", "127.0.0.1:9/toy", "Fix:", asset.sha256):
        assert part in message
    assert str(assets.cache_path(asset)) in message
    assert files_left(asset) == []


def test_offline_switch_asks_nobody(register, server, monkeypatch):
    monkeypatch.setenv("QWENLIB_OFFLINE", "1")
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    register(make_asset(url=server.address + "/toy"))
    with pytest.raises(assets.AssetError, match="QWENLIB_OFFLINE is set"):
        assets.fetch("toy")
    assert server.requests == []


def test_broken_download_is_an_error_and_leaves_nothing(register, server):
    server.pages["/toy"] = (CONTENT[:5000], len(CONTENT))
    asset = register(make_asset(url=server.address + "/toy"))
    with pytest.raises(assets.AssetError, match="broke off after 5,000 of 11,000 bytes"):
        assets.fetch("toy")
    assert files_left(asset) == []
    # The next try, over a line that holds, works.
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_wrong_hash_is_an_error_and_leaves_nothing(register, server):
    other = CONTENT[:-1] + b"!"
    server.pages["/toy"] = (other, len(other))
    asset = register(make_asset(url=server.address + "/toy"))
    with pytest.raises(assets.AssetError, match="wrong hash"):
        assets.fetch("toy")
    assert files_left(asset) == []


def test_wheel_without_the_member_is_an_error(register, wheel):
    wheel({"toy/other.txt": CONTENT})
    asset = register(make_asset(wheel="toy==1.0", member="toy/toy.txt"))
    with pytest.raises(assets.AssetError, match=r"toy-1.0.* has no member toy/toy.txt"):
        assets.fetch("toy")
    assert files_left(asset) == []


def test_wheel_that_is_no_archive_is_an_error(register, wheel):
    wheel({"toy/toy.txt": CONTENT}).write_bytes(b"<html>a login page</html>")
    asset = register(make_asset(wheel="toy==1.0", member="toy/toy.txt"))
    with pytest.raises(assets.AssetError, match="wheel toy==1.0"):
        assets.fetch("toy")
    assert files_left(asset) == []


def test_damaged_cache_file_is_fetched_again(register, server):
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    asset = register(make_asset(url=server.address + "/toy"))
    target = assets.cache_path(asset)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT[:100])
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_leftovers_of_a_killed_fetch_go(register, server):
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    asset = register(make_asset(url=server.address + "/toy"))
    half = assets.cache_path(asset).parent / ".part-killed" / "toy.txt"
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT[:10])
    assets.fetch("toy")
    assert files_left(asset) == ["toy.txt"]


def test_cache_that_cannot_be_written_says_so(tmp_path, register, server, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QWENLIB_CACHE", str(tmp_path / "file"))
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    register(make_asset(url=server.address + "/toy"))
    with pytest.raises(assets.AssetError, match=r"(?s)cannot write to the cache .* QWENLIB_CACHE"):
        assets.fetch("toy")


def _fetch_in_child(asset, barrier, answers):
    assets.ASSETS[asset.name] = asset
    barrier.wait()
    answers.put(hashlib.sha256(assets.fetch(asset.name).read_bytes()).hexdigest())


def test_processes_that_fetch_at_once_download_once(server):
    server.pages["/toy"] = (CONTENT, len(CONTENT))
    asset = make_asset(url=server.address + "/toy")
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    children = [
        context.Process(target=_fetch_in_child, args=(asset, barrier, answers)) for _ in range(3)
    ]
    for child in children:
        child.start()
    digests = {answers.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert digests == {asset.sha256}
    assert server.requests == ["/toy"]
    assert files_left(asset) == ["toy.txt"]


@pytest.mark.network
def test_real_vocabulary_from_the_package_registry(monkeypatch):
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = assets.fetch("qwen-vocabulary")
    lines = path.read_bytes().splitlines()
    assert len(lines) == 151_643
    assert lines[0] == b"IQ== 0"
