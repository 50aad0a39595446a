"""Which input the data lack, told from a model with an encoder."""

from torch import nn

from hf_sparse.calibration.forward import lacking_inputs, missing_input


class Encoder(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision, self.text = Encoder(), nn.Linear(2, 2)

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None, **kwargs):
        pass


class Renaming(Model):
    def forward(self, input_ids, image_pixels=None, image_sizes=None):
        pass


def test_the_encoder_and_its_input_are_named():
    missing = missing_input(Model(), "vision.layer", ["input_ids"])
    assert missing == "vision (Encoder) needs pixel_values"


def test_a_model_that_takes_the_input_under_another_name_shows_what_is_left():
    missing = missing_input(Renaming(), "vision.layer", ["input_ids"])
    assert missing == "vision (Encoder) needs image_pixels or image_sizes"


def test_nothing_is_missing_where_the_data_have_it_or_no_encoder_wants_it():
    assert missing_input(Model(), "vision.layer", ["input_ids", "pixel_values"]) is None
    assert missing_input(Model(), "text", ["input_ids"]) is None


def test_flags_masks_and_labels_are_no_data_that_lack():
    assert lacking_inputs(Model(), ["input_ids"]) == ["pixel_values"]
    assert lacking_inputs(Model(), ["pixel_values", "input_ids"]) == []
