from hvpspec import zoo


def test_every_public_name_exists_and_is_documented() -> None:
    assert [name for name in zoo.__all__ if getattr(zoo, name).__doc__ is None] == []
