"""The tenants' file: what it may say, whose key is whose, and that changing it changes who is let in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import ConfigError
from pdserve.tenants import Tenant, TenantLimits, Tenants, TenantsFile, add_key, cache_salt

NOW_S = 1_800_000_000.0
SECRET = "ab" * 32
HEAD = f'cache_secret = "{SECRET}"\n'
DIGEST = "cd" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


def test_a_new_key_makes_the_file_and_opens_it(path: Path) -> None:
    key = add_key(path, "acme")
    assert path.stat().st_mode & 0o777 == 0o600
    tenant = TenantsFile(path).tenants.find(key, NOW_S)
    assert tenant is not None
    assert tenant.name == "acme"
    assert key.rpartition("_")[2] not in path.read_text(), "the secret itself is kept"


def test_several_keys_of_a_tenant_are_valid_until_each_is_removed(path: Path) -> None:
    first, second, others = add_key(path, "acme"), add_key(path, "acme"), add_key(path, "beta")
    file = TenantsFile(path)
    assert [_name(file.tenants, key) for key in (first, second, others)] == ["acme", "acme", "beta"]
    text = path.read_text()
    start = text.index("[[", text.index("[[") + 1)
    path.write_text(text[: text.index("[[")] + text[start:])  # without the first key
    assert file.refresh()
    assert [_name(file.tenants, key) for key in (first, second, others)] == [None, "acme", "beta"]
    assert not file.refresh(), "nothing changed"


def test_a_key_ends_when_it_expires(path: Path) -> None:
    key = add_key(path, "acme", expires_s=NOW_S)
    tenants = TenantsFile(path).tenants
    assert tenants.find(key, NOW_S - 1) is not None
    assert tenants.find(key, NOW_S) is None


@pytest.mark.parametrize("change", [str.upper, lambda key: key[:-1], lambda key: key + "x", lambda key: "pds_" + key])
def test_what_is_not_the_key_finds_nobody(path: Path, change: object) -> None:
    key = add_key(path, "acme")
    tenants = TenantsFile(path).tenants
    assert callable(change)
    assert tenants.find(change(key), NOW_S) is None
    unknown = f"pds_00000000_{key[13:]}"
    assert tenants.find(unknown, NOW_S) is None


@given(st.text(max_size=80))
def test_no_text_finds_anybody(text: str) -> None:
    tenants = Tenants.parse(HEAD + f'[[tenants.a.keys]]\nid = "00000000"\nsha256 = "{DIGEST}"\n')
    assert tenants.find(text, NOW_S) is None


def test_limits_class_and_group_are_read(path: Path) -> None:
    key = add_key(path, "acme")
    settings = (
        '[tenants.acme]\nslo = "batch"\nrequests_per_minute = 6\ntokens_per_minute = 7\nconcurrent_requests = 8\n'
    )
    path.write_text(path.read_text().replace("[[tenants", settings + "[[tenants", 1))
    tenant = TenantsFile(path).tenants.find(key, NOW_S)
    assert tenant == Tenant("acme", "batch", "tenant acme", TenantLimits(6, 7, 8))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cache_secret"),
        ('cache_secret = "short"', "cache_secret"),
        ("nonsense", "TOML"),
        (HEAD + "port = 1", "port"),
        (HEAD + "tenants = 3", "tenants"),
        (HEAD + '[tenants."a b"]', "no name"),
        (HEAD + "[tenants.a]\nspeed = 1", "speed"),
        (HEAD + "[tenants.a]\nrequests_per_minute = 0", "requests_per_minute"),
        (HEAD + "[tenants.a]\ntokens_per_minute = true", "tokens_per_minute"),
        (HEAD + "[tenants.a]\ncache_group = 1", "cache_group"),
        (HEAD + "[tenants.a]\nkeys = 1", "keys"),
        (HEAD + "[[tenants.a.keys]]\nid = 'x'\nsha256 = ''", "id"),
        (HEAD + "[[tenants.a.keys]]\nid = '00000000'\nsha256 = 'x'", "sha256"),
        (HEAD + f"[[tenants.a.keys]]\nid = '00000000'\nsha256 = '{DIGEST}'\nexpires = 5", "expires"),
        (HEAD + f"[[tenants.a.keys]]\nid = '00000000'\nsha256 = '{DIGEST}'\n" + "secret = 'x'", "secret"),
        (HEAD + "".join(f"[[tenants.{n}.keys]]\nid = '00000000'\nsha256 = '{DIGEST}'\n" for n in "ab"), "twice"),
        (HEAD + "[tenants.a]\nslo = 'fast'", "fast"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong(path: Path, text: str, says: str) -> None:
    def check_slo(slo: str) -> None:
        if slo:
            raise ConfigError(f"no class {slo}")

    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as caught:
        TenantsFile(path, check_slo)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_everybody_reads_is_refused(path: Path) -> None:
    add_key(path, "acme")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        TenantsFile(path)


def test_a_change_that_cannot_be_used_leaves_what_was_and_is_told_once(path: Path) -> None:
    key = add_key(path, "acme")
    file = TenantsFile(path)
    good = path.read_text()
    path.write_text("nonsense")
    with pytest.raises(ConfigError):
        file.refresh()
    assert not file.refresh()
    assert _name(file.tenants, key) == "acme"
    path.unlink()
    with pytest.raises(ConfigError):
        file.refresh()
    assert _name(file.tenants, key) == "acme"
    path.write_text(good)
    path.chmod(0o600)
    assert file.refresh()


def test_a_key_for_a_name_or_file_that_cannot_be_is_refused(path: Path) -> None:
    for name in ("", "a b", "x" * 65, "-a", "a/../b"):
        with pytest.raises(ConfigError):
            add_key(path, name)
    with pytest.raises(ConfigError):
        add_key(path.parent / "nowhere" / "tenants.toml", "acme")
    assert os.listdir(path.parent) == []


def test_salts_differ_by_tenant_deployment_and_what_the_client_adds() -> None:
    one, other = Tenants.parse(HEAD), Tenants.parse(HEAD.replace("ab", "ac"))
    a, b = Tenant("a", cache_group="tenant a"), Tenant("b", cache_group="tenant b")
    salts = [one.cache_salt(a), one.cache_salt(b), one.cache_salt(a, "x"), one.cache_salt(b, "x"), other.cache_salt(a)]
    assert len(set(salts)) == len(salts)


def test_tenants_of_a_group_share_and_none_can_name_itself_into_one(path: Path) -> None:
    keys = [add_key(path, name) for name in ("a", "b", "c")]
    text = path.read_text()
    for name, group in (("a", "team"), ("b", "team"), ("c", "tenant a")):
        text += f'[tenants.{name}]\ncache_group = "{group}"\n'
    # A table must come before its arrays: written anew.
    head, *arrays = text.split("\n\n")
    tables = arrays[-1][arrays[-1].index("[tenants.a]") :]
    arrays[-1] = arrays[-1][: arrays[-1].index("[tenants.a]")]
    path.write_text("\n".join([head, tables, *arrays]))
    tenants = TenantsFile(path).tenants
    a, b, c = (tenants.cache_salt(found) for key in keys if (found := tenants.find(key, NOW_S)) is not None)
    assert a == b != c
    assert c != Tenants.parse(HEAD).cache_salt(Tenant("a", cache_group="tenant a"))


@given(st.tuples(st.text(max_size=8), st.text(max_size=8)), st.tuples(st.text(max_size=8), st.text(max_size=8)))
def test_salts_are_equal_only_for_equal_fields(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (cache_salt(b"s", *one) == cache_salt(b"s", *other)) == (one == other)


def _name(tenants: Tenants, key: str) -> str | None:
    found = tenants.find(key, NOW_S)
    return found.name if found is not None else None
