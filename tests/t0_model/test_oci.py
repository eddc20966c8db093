"""Image documents: what is accepted, what is refused with which reason, and which platform is chosen."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError, UsageError
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.oci import Compression, Descriptor, Document, ImageIndex, Manifest, Platform

ZERO = "sha256:" + "0" * 64
CONFIG = {"mediaType": oci.OCI_CONFIG, "digest": ZERO, "size": 2}
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": ZERO, "size": 7}
MANIFEST: dict[str, Any] = {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": CONFIG, "layers": [LAYER]}
INDEX: dict[str, Any] = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []}


def document(value: object, media_type: str = "") -> Document:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Document(data, media_type, Digest.of(data))


def index_of(*platforms: str | None) -> ImageIndex:
    """An index whose entries' sizes are their positions."""
    found = []
    for number, text in enumerate(platforms):
        platform = None
        if text is not None:
            os, architecture, *variant = text.split("/")
            platform = Platform(architecture, os, *variant)
        found.append(Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest(ZERO), size=number, platform=platform))
    return ImageIndex(manifests=found)


class TestDocuments:
    @pytest.mark.parametrize("served", [oci.OCI_MANIFEST, "", "application/json", "text/plain"])
    def test_a_manifest(self, served: str) -> None:
        manifest = oci.parse_document(document(MANIFEST, served))
        assert isinstance(manifest, Manifest)
        assert manifest.layers[0].size == 7
        assert isinstance(manifest.layers[0].digest, Digest)

    def test_a_docker_manifest_and_list(self) -> None:
        config = {**CONFIG, "mediaType": oci.DOCKER_CONFIG}
        manifest = {**MANIFEST, "mediaType": oci.DOCKER_MANIFEST, "config": config}
        assert isinstance(oci.parse_document(document(manifest, oci.DOCKER_MANIFEST)), Manifest)
        index = {**INDEX, "mediaType": oci.DOCKER_INDEX}
        assert isinstance(oci.parse_document(document(index, oci.DOCKER_INDEX)), ImageIndex)

    def test_the_members_decide_where_no_type_is_said(self) -> None:
        manifest = {key: value for key, value in MANIFEST.items() if key != "mediaType"}
        assert isinstance(oci.parse_document(document(manifest)), Manifest)
        assert isinstance(oci.parse_document(document({"schemaVersion": 2, "manifests": []})), ImageIndex)

    @pytest.mark.parametrize(
        ("value", "served", "reason"),
        [
            (MANIFEST, oci.OCI_INDEX, "served as"),
            (INDEX, oci.OCI_MANIFEST, "served as"),
            ({**MANIFEST, "mediaType": oci.DOCKER_MANIFEST}, oci.OCI_MANIFEST, "served as"),
            ({**MANIFEST, "manifests": []}, oci.OCI_MANIFEST, "at once"),
            ({**INDEX, "layers": []}, oci.OCI_INDEX, "at once"),
            ({**INDEX, "config": CONFIG}, oci.OCI_INDEX, "at once"),
            ({**INDEX, "layers": None}, oci.OCI_INDEX, "at once"),
            ({"schemaVersion": 2, "manifests": []}, oci.OCI_MANIFEST, "not those of its media type"),
            ({"schemaVersion": 2, "config": CONFIG, "layers": []}, oci.OCI_INDEX, "not those of its media type"),
            ({**MANIFEST, "schemaVersion": 3}, oci.OCI_MANIFEST, "schemaVersion"),
            ({**MANIFEST, "layers": [{**LAYER, "size": -1}]}, "", "size"),
            ({**MANIFEST, "layers": [{**LAYER, "size": 1 << 63}]}, "", "size"),
            ({**MANIFEST, "layers": [{**LAYER, "size": 1.5}]}, "", "size"),
            ({**MANIFEST, "layers": [{**LAYER, "digest": "sha256:../../x"}]}, "", "digest"),
            ({**MANIFEST, "layers": [{**LAYER, "digest": 7}]}, "", "digest"),
            ({**MANIFEST, "layers": {}}, "", "malformed"),
            ([], "", "malformed"),
            (b"", "", "malformed"),
            (b"\xff\xfe", "", "malformed"),
            (b"[" * 100_000, "", "malformed"),
            (b'{"schemaVersion":2,"x":' + b"[" * 100_000, "", "malformed"),
        ],
    )
    def test_what_could_be_understood_in_two_ways_is_corrupt(self, value: object, served: str, reason: str) -> None:
        with pytest.raises(CorruptError, match=reason):
            oci.parse_document(document(value, served))

    @pytest.mark.parametrize(
        ("value", "served", "reason"),
        [
            ({"schemaVersion": 1, "fsLayers": [], "history": []}, "", "schema 1"),
            ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
            (
                {**MANIFEST, "config": {**CONFIG, "mediaType": "application/vnd.helm.config.v1+json"}},
                "",
                "artifact",
            ),
            ({**MANIFEST, "layers": [LAYER] * 1001}, "", "too many layers"),
            (MANIFEST | {"mediaType": "text/html"}, "text/html", "not an image"),
        ],
    )
    def test_what_cannot_be_shown(self, value: object, served: str, reason: str) -> None:
        with pytest.raises(UnsupportedError, match=reason):
            oci.parse_document(document(value, served))

    def test_a_thousand_layers_are_accepted(self) -> None:
        parsed = oci.parse_manifest(document({**MANIFEST, "layers": [LAYER] * 1000}))
        assert len(parsed.layers) == 1000

    def test_an_index_is_no_manifest(self) -> None:
        with pytest.raises(CorruptError, match="index where a manifest"):
            oci.parse_manifest(document(INDEX))

    def test_urls_are_not_even_kept(self) -> None:
        hostile = {**MANIFEST, "layers": [{**LAYER, "urls": ["https://elsewhere.example/"]}]}
        assert not hasattr(oci.parse_manifest(document(hostile)).layers[0], "urls")

    def test_cut_off_anywhere_is_corrupt(self) -> None:
        data = json.dumps(MANIFEST).encode()
        for end in range(len(data)):
            with pytest.raises(CorruptError):
                oci.parse_document(document(data[:end]))

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda x: (
                st.lists(x)
                | st.dictionaries(
                    st.sampled_from(["schemaVersion", "mediaType", "manifests", "layers", "config", "digest", "size"]),
                    x,
                )
            ),
        )
    )
    def test_any_json_gives_a_result_or_a_clear_error(self, value: object) -> None:
        with contextlib.suppress(CorruptError, UnsupportedError):
            oci.parse_document(document(value))


class TestConfig:
    MANIFEST = oci.parse_manifest(document(MANIFEST))

    def parse(self, **changes: object) -> oci.ImageConfig:
        value = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [ZERO]}, **changes}
        return oci.parse_config(json.dumps(value).encode(), self.MANIFEST)

    def test_a_config(self) -> None:
        config = self.parse(config={"Env": ["A=b"], "Cmd": None, "WorkingDir": "/x", "Labels": {"a": "b"}, "New": 1})
        assert config.diff_ids == (ZERO,)
        assert str(config.platform) == "linux/amd64"
        assert (config.runtime.env, config.runtime.cmd, config.runtime.working_dir) == (["A=b"], None, "/x")
        assert config.config["New"] == 1

    @pytest.mark.parametrize("value", [None, {}])
    def test_nothing_to_run(self, value: object) -> None:
        assert self.parse(config=value).runtime == oci.Runtime()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"rootfs": {"diff_ids": []}}, "disagree: 1 layers, 0 diff IDs"),
            ({"rootfs": {"diff_ids": [ZERO, ZERO]}}, "disagree"),
            ({"rootfs": None}, "disagree"),
            ({"rootfs": {"diff_ids": ["sha256:x"]}}, "digest"),
            ({"config": {"Env": "A=b"}}, "malformed"),
            ({"config": []}, "malformed"),
            ({"os": 3}, "malformed"),
        ],
    )
    def test_refused(self, changes: dict[str, object], reason: str) -> None:
        with pytest.raises(CorruptError, match=reason):
            self.parse(**changes)


class TestPlatform:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm", "linux/arm"),
            ("linux/arm/v7", "linux/arm"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/armel", "linux/arm/v6"),
            ("Linux/AMD64", "linux/amd64"),
        ],
    )
    def test_normal_forms(self, text: str, normal: str) -> None:
        assert str(Platform.parse(text)) == normal

    @pytest.mark.parametrize("text", ["", "amd64", "linux/", "/amd64", "a/b/c/d", "linux/amd 64", "linux/amd64/"])
    def test_no_platform(self, text: str) -> None:
        with pytest.raises(UsageError):
            Platform.parse(text)

    @pytest.mark.parametrize(
        ("offered", "wanted", "chosen"),
        [
            (["linux/amd64", "linux/arm64"], "linux/arm64", 1),
            (["linux/arm64/v8", "linux/amd64"], "linux/arm64", 0),
            (["linux/arm64"], "linux/arm64/v8", 0),
            (["linux/amd64", "linux/amd64"], "linux/amd64", 0),
            (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
            (["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], "linux/amd64/v3", 1),
            (["linux/arm/v5", "linux/arm/v6"], "linux/arm/v7", 1),
            (["linux/arm/v5", "linux/arm/v7"], "linux/arm/v6", 0),
            (["linux/arm64"], "linux/arm64/v9", 0),
            (["unknown/unknown", None], "linux/amd64", 1),
            (["unknown/unknown", "linux/amd64"], "linux/amd64", 1),
        ],
    )
    def test_choice(self, offered: list[str | None], wanted: str, chosen: int) -> None:
        assert oci.choose_platform(index_of(*offered), Platform.parse(wanted)).size == chosen

    @pytest.mark.parametrize(
        ("offered", "wanted", "listing"),
        [
            (["linux/arm64", "windows/amd64", "unknown/unknown"], "linux/amd64", "linux/arm64, windows/amd64"),
            (["linux/amd64/v3"], "linux/amd64", "linux/amd64/v3"),
            (["linux/arm/v7"], "linux/arm/v6", "linux/arm/v7"),
            ([], "linux/amd64", "none"),
            ([None, None], "linux/amd64", "none"),
            (["unknown/unknown"], "linux/amd64", "none"),
        ],
    )
    def test_no_choice_lists_what_there_is(self, offered: list[str | None], wanted: str, listing: str) -> None:
        with pytest.raises(NotFoundError, match=listing):
            oci.choose_platform(index_of(*offered), Platform.parse(wanted))

    def test_of_a_single_image(self) -> None:
        oci.check_platform(Platform("amd64", "linux"), Platform.parse("linux/x86_64"))
        with pytest.raises(NotFoundError, match="linux/arm64: there is linux/amd64"):
            oci.check_platform(Platform("amd64", "linux"), Platform.parse("linux/arm64"))

    def test_the_listing_carries_no_escape_sequences(self) -> None:
        with pytest.raises(NotFoundError) as caught:
            oci.choose_platform(index_of("linux/\x1b[2J"), Platform.parse("linux/amd64"))
        assert caught.value.message.isprintable()

    @given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4)), max_size=4))
    def test_hostile_platforms(self, platforms: list[tuple[str, str, str]]) -> None:
        descriptors = [
            Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest(ZERO), size=0, platform=Platform(a, o, v))
            for o, a, v in platforms
        ]
        with contextlib.suppress(NotFoundError):
            oci.choose_platform(ImageIndex(manifests=descriptors), Platform("arm", "linux", "v7"))


class TestLayerFormat:
    @pytest.mark.parametrize(
        ("media_type", "compression"),
        [
            ("application/vnd.oci.image.layer.v1.tar", Compression.NONE),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression.GZIP),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Compression.ZSTD),
            ("application/vnd.docker.image.rootfs.diff.tar", Compression.NONE),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression.GZIP),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Compression.ZSTD),
        ],
    )
    def test_plain(self, media_type: str, compression: Compression) -> None:
        assert oci.layer_format(media_type, None) == oci.LayerFormat(compression)

    @pytest.mark.parametrize(
        "media_type",
        [
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ],
    )
    def test_foreign(self, media_type: str) -> None:
        found = oci.layer_format(media_type)
        assert found.foreign
        assert not found.refused
        assert found.compression is Compression.GZIP

    @pytest.mark.parametrize("inner", ["", "+gzip", "+zstd"])
    def test_encrypted(self, inner: str) -> None:
        found = oci.layer_format(f"application/vnd.oci.image.layer.v1.tar{inner}+encrypted")
        assert "encrypted" in found.refused

    @pytest.mark.parametrize(
        "media_type",
        [
            "",
            "text/plain",
            "application/vnd.oci.image.layer.v1.tar+xz",
            "application/vnd.oci.image.layer.v1.tar+gzip ",
            "application/vnd.in-toto+json",
            "xapplication/vnd.oci.image.layer.v1.tar",
        ],
    )
    def test_unknown(self, media_type: str) -> None:
        assert "unknown media type" in oci.layer_format(media_type).refused

    def test_estargz(self) -> None:
        gzip = "application/vnd.oci.image.layer.v1.tar+gzip"
        notes = {"containerd.io/snapshot/stargz/toc.digest": ZERO}
        assert oci.layer_format(gzip, notes).toc == ZERO
        assert oci.layer_format(gzip, notes).name == "estargz"
        assert oci.layer_format(gzip, {"containerd.io/snapshot/stargz/toc.digest": "sha256:x"}).toc is None
        assert oci.layer_format("application/vnd.oci.image.layer.v1.tar+zstd", notes).toc is None
