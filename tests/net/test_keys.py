"""The bus key: derivation against RFC 5869, the file's format and its guards, and secrets that stay out of sight."""

import base64
import os
import pickle
import stat

import pytest
import zmq
from zmq.utils import z85

from zmqbus.errors import AuthError, KeyFileError
from zmqbus.net.keys import KEY_BYTES, PREFIX, BusKey, CurvePair, hkdf_sha256

KEY = bytes(range(32))

# RFC 5869, appendix A.1 to A.3: input key, salt, info, output
RFC_5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("key", "salt", "info", "output"), RFC_5869)
def test_hkdf_matches_the_rfc(key, salt, info, output):
    key, salt, info, output = map(bytes.fromhex, (key, salt, info, output))
    assert hkdf_sha256(key, salt, info, len(output)) == output
    assert hkdf_sha256(key, salt, info, 7) == output[:7]


@pytest.mark.parametrize("length", [0, -1, 255 * 32 + 1])
def test_hkdf_refuses_lengths_the_rfc_does_not_define(length):
    with pytest.raises(ValueError, match="8160"):
        hkdf_sha256(KEY, b"", b"", length)


def test_derivation_is_pinned():
    """A change here locks every node of the old version out: it needs a new key format, not a new expectation."""
    key = BusKey(KEY)
    assert key.fingerprint == "124d3db0d060aac1"
    assert key.server.public == b"ar2u{b{lPYaCnOQQqzY+vNw55AEPxI2sW^B>YO#@"
    assert key.client.public == b"Z?}WO-LT4?@IngO+uLFpn+8rQikt(pkLt6Nb-o=a"


def test_pairs_are_curve_pairs_and_differ():
    key = BusKey.generate()
    for pair in (key.server, key.client):
        assert len(z85.decode(pair.public)) == len(z85.decode(pair.secret)) == 32
        assert zmq.curve_public(pair.secret) == pair.public
    parts = {key.server.public, key.server.secret, key.client.public, key.client.secret}
    assert len(parts) == 4


def test_generated_keys_differ():
    one, other = BusKey.generate(), BusKey.generate()
    assert one != other
    assert one.fingerprint != other.fingerprint
    assert one.client != other.client


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_is_32_bytes(length):
    with pytest.raises(ValueError, match="32 bytes"):
        BusKey(bytes(length))


def test_secrets_stay_out_of_repr():
    key = BusKey(KEY)
    shown = repr(key) + str(key) + repr(key.server) + str(key.client) + f"{key} {key.server}"
    assert key.fingerprint in shown
    for secret in (KEY, z85.decode(key.server.secret), z85.decode(key.client.secret)):
        for text in (secret.hex(), repr(secret), base64.b64encode(secret).decode(), z85.encode(secret).decode()):
            assert text not in shown


def test_equality_and_pickle():
    key = BusKey(KEY)
    assert key == BusKey(KEY)
    assert hash(key) == hash(BusKey(KEY))
    assert key != BusKey(KEY[::-1])
    assert key != KEY
    assert pickle.loads(pickle.dumps(key)) == key  # a key may travel to a child process


# --- the file ----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bus.key"


def write(path, data, mode=0o600):
    path.write_bytes(data)
    path.chmod(mode)


def line_of(path):
    BusKey(KEY).save(path)
    return path.read_bytes()


def test_key_survives_save_and_load(path):
    key = BusKey.generate()
    key.save(path)
    loaded = BusKey.load(str(path))
    assert loaded == key
    assert loaded.server == key.server
    assert loaded.client == key.client


def test_file_format_is_pinned(path):
    assert line_of(path) == b"zmqbus-key-1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-Sd4Px\n"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277, 0o777])
def test_file_is_private_under_any_umask(path, umask):
    before = os.umask(umask)
    try:
        BusKey(KEY).save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert BusKey.load(path) == BusKey(KEY)


def test_file_is_private_from_its_first_instant(path, monkeypatch):
    modes = []
    fchmod = os.fchmod

    def spy(descriptor, mode):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", spy)
    before = os.umask(0)
    try:
        BusKey(KEY).save(path)
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_save_syncs_the_file_and_then_its_directory(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((stat.S_IFMT(os.fstat(fd).st_mode), path.stat().st_size)))
    BusKey(KEY).save(path)
    assert synced == [(stat.S_IFREG, 62), (stat.S_IFDIR, 62)]


def test_save_never_overwrites(path):
    write(path, b"precious")
    with pytest.raises(KeyFileError, match="exists already"):
        BusKey(KEY).save(path)
    assert path.read_bytes() == b"precious"


def test_save_does_not_follow_a_dangling_link(path, tmp_path):
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="exists already"):
        BusKey(KEY).save(path)
    assert not (tmp_path / "elsewhere").exists()


def test_failed_save_leaves_no_partial_file(path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyFileError, match=r"cannot be written: No space left on device$"):
        BusKey(KEY).save(path)
    assert not path.exists()


def test_save_into_a_missing_directory(path):
    with pytest.raises(KeyFileError, match="cannot be created: No such file or directory"):
        BusKey(KEY).save(path.parent / "missing" / "bus.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666, 0o777])
def test_key_open_to_others_is_refused(path, mode):
    write(path, line_of(path), mode)
    with pytest.raises(KeyFileError) as refused:
        BusKey.load(path)
    assert f"chmod 600 {path}" in str(refused.value)
    assert refused.value.path == path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_key_open_to_its_owner_only_is_accepted(path, mode):
    write(path, line_of(path), mode)
    assert BusKey.load(path) == BusKey(KEY)


def test_key_of_another_user_is_refused(path, monkeypatch):
    line_of(path)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(KeyFileError, match="another user"):
        BusKey.load(path)


def test_missing_key(path):
    with pytest.raises(KeyFileError, match=r"not found; .*zmqbus keygen"):
        BusKey.load(path)


def test_unreadable_key(path, monkeypatch):
    line_of(path)

    def fail(*_):
        raise PermissionError(13, "Permission denied")  # by hand, because root may read everything

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(KeyFileError, match=r"cannot be read: Permission denied$"):
        BusKey.load(path)


def test_key_on_a_failing_disk(path, monkeypatch):
    line_of(path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(KeyFileError, match=r"cannot be read: Input/output error$"):
        BusKey.load(path)


def test_directory_and_fifo_are_refused_without_waiting(tmp_path):
    with pytest.raises(KeyFileError, match="not a regular file"):
        BusKey.load(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(KeyFileError, match="not a regular file"):
        BusKey.load(tmp_path / "fifo")


@pytest.mark.parametrize("data", [b"", b"\n", b"hello\n", b"\0" * 5000, b"zmqbus-key-2:" + b"A" * 48, b"\xff\xfe"])
def test_other_files_are_refused(path, data):
    write(path, data)
    with pytest.raises(KeyFileError, match="not a zmqbus key file"):
        BusKey.load(path)


def test_every_cut_is_refused(path):
    line = line_of(path)
    for cut in range(len(line) - 1):  # without the newline only, it is whole
        write(path, line[:cut])
        with pytest.raises(KeyFileError):
            BusKey.load(path)
    for whole in (line, line[:-1], line[:-1] + b"\r\n"):
        write(path, whole)
        assert BusKey.load(path) == BusKey(KEY)


def test_every_typo_is_detected(path):
    line = line_of(path)
    for at in range(len(PREFIX), len(line) - 1):
        typo = bytearray(line)
        typo[at] = ord("A") if typo[at] != ord("A") else ord("B")
        write(path, bytes(typo))
        with pytest.raises(KeyFileError, match="checksum does not fit"):
            BusKey.load(path)


def test_errors_are_one_line_and_never_quote_the_key(path):
    line = line_of(path)
    for data in (line[:40], line[:-3] + b"??\n", line + line, b" " + line):
        write(path, data)
        with pytest.raises(AuthError) as refused:
            BusKey.load(path)
        assert "\n" not in str(refused.value)
        assert line[20:30].decode() not in str(refused.value)
        assert str(path) in str(refused.value)


def test_curve_pair_compares_by_value():
    assert CurvePair(b"p", b"s") == CurvePair(b"p", b"s")
    assert len(KEY) == KEY_BYTES
