"""Read a config.json's sliding windows."""

from __future__ import annotations

from ..common.config_reader import ConfigReader, config_error

DEFAULT_WINDOW = 4096
SLIDING_ATTENTION, FULL_ATTENTION = "sliding_attention", "full_attention"


def no_windows(num_layers: int) -> tuple[int | None, ...]:
    """Every layer attends to all tokens before it."""
    return (None,) * num_layers


def same_window(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """The window of sliding_window in every layer."""
    return (_read_window(reader),) * num_layers


def windows_by_layer(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """The window of sliding_window in the layers that layer_types or max_window_layers select."""
    window = _read_window(reader) if reader.get_bool("use_sliding_window") else None
    first_sliding = reader.get_int("max_window_layers", 28, min_value=0)
    layer_types = reader.data.get("layer_types") or [
        SLIDING_ATTENTION if window and i >= first_sliding else FULL_ATTENTION for i in range(num_layers)
    ]
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(t not in (SLIDING_ATTENTION, FULL_ATTENTION) for t in layer_types)
    ):
        raise config_error(
            "layer_types",
            layer_types,
            f"it must list {SLIDING_ATTENTION!r} or {FULL_ATTENTION!r} for each of {num_layers} layers",
        )
    if SLIDING_ATTENTION in layer_types and window is None:
        raise config_error(
            "layer_types",
            layer_types,
            "sliding_attention layers need use_sliding_window and sliding_window",
        )
    return tuple(window if layer_type == SLIDING_ATTENTION else None for layer_type in layer_types)


def _read_window(reader: ConfigReader) -> int | None:
    """sliding_window, null for none."""
    if reader.data.get("sliding_window", DEFAULT_WINDOW) is None:
        return None
    return reader.get_int("sliding_window", DEFAULT_WINDOW)
