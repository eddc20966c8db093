from __future__ import annotations

from pathlib import Path

import pytest

from nsfs.errors import NotFoundError, UsageError
from nsfs.model.encryption import Encrypt
from nsfs.model.explain import follows_of, sharers_of
from nsfs.model.policy import Isolation, Policy, Rule, ScopeRequest, decide_scope
from nsfs.serve.config import parse_config
from nsfs.serve.policy_file import load_policy, parse_policy

EXAMPLE = Path(__file__).parents[2] / "contrib/policy.toml"


def domain_of(policy: Policy, namespace: str, reference: str, plugin: str = "nsfs") -> str:
    request = ScopeRequest(namespace=namespace, references=(reference,), plugin=plugin, mount_id="m")
    return decide_scope(policy, request).on_host().name


def test_the_example_does_what_it_says() -> None:
    policy = parse_policy(EXAMPLE.read_text(), Isolation.SHARED)
    assert domain_of(policy, "team-a", "docker.io/library/python:3") == "public"
    assert domain_of(policy, "build-1", "docker.io/library/python:3") == "pod/m"
    assert domain_of(policy, "team-x-dev", "registry.example/team-x/a/b:1") == "team-x"
    assert domain_of(policy, "team-x-prod", "registry.example/team-x/a/b:1") == "team-x"
    assert domain_of(policy, "team-a", "registry.example/team-x/a/b:1") == "ns/team-a"
    assert domain_of(policy, "k8s.io", "registry.example/a:1", "nsfs-team-a") == "ns/k8s.io/team-a"


def test_nothing_said_is_the_default() -> None:
    assert parse_policy("", Isolation.POD) == Policy(Isolation.POD)
    assert parse_policy("[[rule]]\nscope = 'guest'", Isolation.POD).rules == (Rule(scope=Isolation.GUEST),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]", "f is no TOML"),
        ("[[rules]]", "f: object contains unknown field `rules`"),
        ("[[rule]]", r"f: rule\[0\]: object missing required field `scope`"),
        ("[[rule]]\nscope = 'open'", r"f: rule\[0\].scope: invalid enum value 'open'"),
        ("[[rule]]\nscope = 'pod'\nimages = '*'", r"f: rule\[0\]: object contains unknown field `images`"),
        ("[[rule]]\nscope = 'pod'\nimage = 3", r"f: rule\[0\].image: expected `str`, got `int`"),
        ("[[rule]]\nscope = 'pod'\n[[rule]]\nscope = 'pod'\ndomain = 'x'", "f: rule 2: only a shared scope has"),
        ("[[rule]]\nscope = 'shared'\ndomain = 'ns/team-b'", "f: rule 1: not a domain: 'ns/team-b'"),
        ("[[rule]]\nscope = 'shared'\nimage = 'docker.io/library/a:1'", "f: rule 1: an image pattern with a tag"),
    ],
)
def test_mistakes_are_refused_and_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_policy(text, Isolation.ISOLATED, "f")


def test_the_file_is_found_by_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    config = parse_config(f"isolation = 'pod'\npolicy = '{path}'")
    with pytest.raises(NotFoundError, match="no such policy"):
        load_policy(config)
    path.write_text("[[rule]]\nscope = 'shared'\n")
    assert load_policy(config) == Policy(Isolation.POD, (Rule(scope=Isolation.SHARED),))
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="policy is not readable"):
        load_policy(config)
    assert load_policy(parse_config("")) == Policy()


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(UsageError, match="policy: not an absolute path"):
        parse_config("policy = 'policy.toml'")


def test_who_else_shares_is_said() -> None:
    policy = parse_policy(EXAMPLE.read_text(), Isolation.ISOLATED)

    def sharers(namespace: str, reference: str, wish: str | None = None) -> list[str]:
        request = ScopeRequest(namespace=namespace, references=(reference,), wish=wish)
        return sharers_of(policy, decide_scope(policy, request))

    assert sharers("a", "docker.io/library/x") == ["rule 2: namespace **, image docker.io/library/*, plugin name **"]
    assert sharers("a", "registry.example/x") == []
    assert sharers("a", "registry.example/x", "guest") == []
    assert sharers("a", "registry.example/x", "shared") == [
        "plugin name nsfs-shared, and --isolation shared, where no rule says otherwise"
    ]


@pytest.mark.parametrize("scope", Isolation)
def test_every_scope_says_what_follows(scope: Isolation) -> None:
    request = ScopeRequest(namespace="a", references=("docker.io/library/x",), mount_id="m")
    follows = follows_of(decide_scope(Policy(scope), request), Encrypt.ISOLATED)
    assert follows.keys() == {"disk", "memory", "process", "seen", "ends", "key", "index"}
    assert (
        follows["key"]
        == {
            Isolation.SHARED: "not encrypted",
            Isolation.ISOLATED: "encrypted on disk, under a key of its own that goes with it",
            Isolation.POD: "encrypted on disk, under a key of its own that is in memory alone",
            Isolation.GUEST: "nothing to encrypt",
        }[scope]
    )


def test_a_rule_and_the_configuration_say_what_is_believed_beside_an_image(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[rule]]\nscope = "shared"\ntrust_index = "same-repository"\n')
    policy = load_policy(parse_config(f'policy = "{path}"\ntrust_index = "sha256:{"a" * 64}"'))
    assert policy.trust_index == "sha256:" + "a" * 64
    assert [rule.trust_index for rule in policy.rules] == ["same-repository"]
    request = ScopeRequest(namespace="a", references=("docker.io/library/x:1",), mount_id="1")
    assert "may push" in follows_of(decide_scope(policy, request), Encrypt.ISOLATED)["index"]
    path.write_text('[[rule]]\nscope = "shared"\ntrust_index = "all"\n')
    with pytest.raises(UsageError, match="rule 1: not a trust"):
        load_policy(parse_config(f'policy = "{path}"'))
    with pytest.raises(UsageError, match="not a trust"):
        load_policy(parse_config('trust_index = "all"'))
