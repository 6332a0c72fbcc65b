"""A chat template that asks for today's date gets the same one on every day."""

import jinja2

from mslora_cr.data.chat import DATE, dated


def test_the_date_is_fixed() -> None:
    template = (
        "{% set today = strftime_now('%d %b %Y') %}{% if strftime_now is defined %}Today: {{ today }}{% endif %}, "
        "{{ strftime_now('%A, %H:%M') }}"
    )
    expected = f"Today: {DATE.strftime('%d %b %Y')}, {DATE.strftime('%A, %H:%M')}"
    assert jinja2.Template(dated(template)).render() == expected == "Today: 26 Jul 2024, Friday, 00:00"


def test_other_templates_stay_as_they_are() -> None:
    assert dated("{{ messages[0].content }}") == "{{ messages[0].content }}"
