import json

import pytest

from diffjax.utils.errors import UserError
from diffjax.weights import config as c
from diffjax.weights.unet2d import FORMAT

FIELDS = {
    "width": c.Field(8, c.integer(1, 100)),
    "rate": c.Field(0.5, c.number(0, 1)),
    "kind": c.Field("a", c.one_of("a", "b", None)),
    "sizes": c.Field((1,), c.list_of(c.integer(1), 1, 3)),
    "either": c.Field(None, c.optional(c.either(c.integer(1), c.list_of(c.integer(1), 2, 2)))),
    "flag": c.Field(False, c.BOOLEAN),
}


def test_defaults_fill_what_is_left_out_and_notes_are_no_fields():
    read = c.read_fields({"_class_name": "X", "sizes": [1, 2], "kind": None}, FIELDS, "config.json")
    assert read == {"width": 8, "rate": 0.5, "kind": None, "sizes": (1, 2), "either": None, "flag": False}


@pytest.mark.parametrize(
    "name, value",
    [
        ("width", 0),
        ("width", True),
        ("width", 2.0),
        ("width", None),
        ("rate", float("nan")),
        ("rate", "1"),
        ("kind", "c"),
        ("kind", ["a"]),
        ("kind", {}),
        ("sizes", []),
        ("sizes", [1, 2, 3, 4]),
        ("sizes", [1, "2"]),
        ("sizes", 1),
        ("either", [1]),
        ("flag", 1),
        ("flag", "false"),
        ("new_field", 1),
    ],
)
def test_what_is_not_implemented_is_named(name, value):
    with pytest.raises(UserError, match=rf"^config.json: .*{name}.*not implemented"):
        c.read_fields({name: value}, FIELDS, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"a": ' * 100_000, "\ud800"])
def test_damaged_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="config.json"):
        c.read_json(tmp_path / "config.json")


def test_a_missing_or_huge_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="name an existing model folder"):
        c.read_json(tmp_path / "config.json")
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="larger than any configuration"):
        c.read_json(tmp_path / "config.json")


def test_classes_of_both_libraries():
    assert c.class_name({"_class_name": "UNet2DModel"}) == "UNet2DModel"
    assert c.class_name({"architectures": ["T5EncoderModel"]}) == "T5EncoderModel"
    assert c.class_name({"_class_name": ["x"]}) is None and c.class_name({}) is None


@pytest.mark.parametrize(
    "change, named",
    [
        ({"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"norm_num_groups": 7}, "norm_num_groups = 7"),
        ({"attn_norm_num_groups": 7}, "attn_norm_num_groups"),
        ({"attention_head_dim": 64}, "attention_head_dim = 64"),
        ({"block_out_channels": [16]}, "block_out_channels"),
        ({"encoder_hid_dim": 3}, "encoder_hid_dim"),
        ({"resnet_eps": 1e-5}, "resnet_eps is the old name of norm_eps"),
    ],
)
def test_unets_that_are_not_implemented(change, named):
    plain = dict(
        norm_num_groups=8,
        norm_eps=1e-6,
        block_out_channels=[16, 32],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    )
    FORMAT.module(plain, "config.json")
    with pytest.raises(UserError, match=named):
        FORMAT.module(plain | change, "config.json")


def test_names_of_the_first_releases():
    old = dict(
        image_size=16,
        num_res_blocks=1,
        block_channels=[16, 32],
        down_blocks=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        up_blocks=["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
        resnet_eps=1e-6,
        resnet_num_groups=8,
        resnet_act_fn="silu",
        num_head_channels=None,
        downscale_freq_shift=1,
    )
    new = dict(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=[16, 32],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        norm_eps=1e-6,
        norm_num_groups=8,
        act_fn="silu",
        attention_head_dim=None,
        freq_shift=1,
    )
    assert FORMAT.module(old, "config.json") == FORMAT.module(new, "config.json")
    again = json.loads(json.dumps(FORMAT.config(FORMAT.module(old, "config.json"))))
    assert FORMAT.module(again, "config.json") == FORMAT.module(new, "config.json")
