"""The page of all commands is made from the commands."""

import command_pages


def test_the_page_of_all_commands_is_up_to_date():
    assert command_pages.PAGE.read_text(encoding="utf-8") == command_pages.command_page()
