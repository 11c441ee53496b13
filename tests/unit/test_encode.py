"""What the kernel could not know reaches the topic as null, beside rows of the same batch where it is known."""

import numpy as np
import pytest

from producer.decode import Decoder
from producer.encode import BatchEncoder, load_schema
from producer.events import CA_STATES, KNOWN, STREAMS, Batch, Stream

_HOST_FIELDS = {"host": "here", "boot_id": "00000000-0000-4000-8000-000000000000"}


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_an_unknown_congestion_state_is_null_and_not_the_first_name(stream: Stream) -> None:
    rows = np.zeros(3, stream.dtype)
    rows["s"]["known"] = [0, KNOWN["ca_state"], KNOWN["ca_state"]]
    rows["s"]["ca_state"] = [0, 0, CA_STATES.index("Loss")]
    encoder = BatchEncoder(stream, load_schema(stream), stream.fixed_schema_id, _HOST_FIELDS, lambda cgroup_id: None)
    messages = encoder.encode(Batch(stream, rows, 0), 0)
    values = [
        messages.payload[start : start + length].tobytes()
        for start, length in zip(messages.starts, messages.lengths, strict=True)
    ]
    assert [Decoder(None).decode(value)["ca_state"] for value in values] == [None, "Open", "Loss"]
