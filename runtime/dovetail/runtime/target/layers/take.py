"""Take the first layers out of a target, and open them on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.runtime.target.layers.choose import check_count
from dovetail.runtime.target.layers.device import LayerDevice
from dovetail.runtime.target.layers.graph import cut, stream, translate
from dovetail.runtime.target.layers.session import LayerSession
from dovetail.runtime.target.layers.texts import FirstLayers

if TYPE_CHECKING:
    import openvino as ov

    from dovetail.runtime.target.features import FeatureMix


@dataclass(frozen=True)
class TakeLayers:
    """Opens the first `count` layers on a device; implements Take."""

    count: int
    device: LayerDevice
    capacity: int  # tokens of a text
    texts: int = 1  # that the device holds at once
    threads: int | None = None

    def outputs(self, model: ov.Model) -> list[ov.Output]:
        """See Take. Raises InputError, also for more layers than the target has."""
        found = stream(model)
        check_count(self.count, len(found))
        return found

    def __call__(self, model: ov.Model, outputs: list[ov.Output], mix: FeatureMix | None) -> FirstLayers:
        """See Take. Raises InputError for layers that cannot be translated, DeviceError."""
        graph = translate(
            outputs, self.count, mix, capacity=self.capacity,
            kv_type=self.device.kv_type, compressed=self.device.compressed,
        )  # fmt: skip
        session = LayerSession(graph, self.device, self.texts, self.threads)
        cut(model, outputs[self.count - 1])
        return FirstLayers(session, self.count, self.device)
