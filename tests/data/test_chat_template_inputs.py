"""Where the tokens of a text are once a processor has replaced its images' placeholders."""

import pytest

from mslora_cr.data.chat import aligned

IMAGE = 9


@pytest.mark.parametrize(
    ("text", "ids", "found"),
    [
        ([1, 2, 3], [1, 2, 3], {0: 0, 1: 1, 2: 2}),  # no image
        ([1, IMAGE, 2, 3], [1, 7, 7, 7, 2, 3], {0: 0, 2: 4, 3: 5}),
        ([IMAGE, IMAGE, 2], [7, 8, 7, 7, 8, 2], {2: 5}),
        ([1, IMAGE, 2, 3, IMAGE, 4], [1, 7, 2, 7, 2, 3, 7, 4], {0: 0, 2: 4, 3: 5, 5: 7}),  # a part of an image, too
        ([1, IMAGE, 2], [1, IMAGE, 2], {0: 0, 2: 2}),  # cross attention: the placeholder stays
        ([1, IMAGE, 2], [1, 7, 2, 5], {0: 0}),  # a processor that writes behind the text
        ([1, 2], [1, 2, 5], {}),
        ([1, IMAGE, 2, IMAGE, 3], [1, 7, 7, 3], {0: 0}),  # a part that is gone
    ],
)
def test_text_is_found_between_images(text: list[int], ids: list[int], found: dict[int, int]) -> None:
    assert dict(aligned(text, ids, IMAGE)) == found
