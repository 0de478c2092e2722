"""The closed list of reasons for which a record is not scored."""

from enum import StrEnum


class Reason(StrEnum):
    """Reason codes of dead letters; docs/dead-letters.md explains each to a person."""

    BAD_TIME = "bad_time"  # no usable event time, or one too far in the future
    BAD_ENCODING = "bad_encoding"  # not UTF-8
    BAD_JSON = "bad_json"  # not JSON
    UNKNOWN_FORMAT = "unknown_format"  # JSON, but no log format recognises it
    BAD_MESSAGES = "bad_messages"  # the format is known, its messages are not usable
    EMPTY_CONVERSATION = "empty_conversation"  # no message with any text
    UNKNOWN_MODEL = "unknown_model"  # of several models, the record names none that is watched
    TEMPLATE_ERROR = "template_error"  # the model's chat template refuses the conversation
    NOT_FINITE = "not_finite"  # NaN or Inf in the activations
    OUT_OF_MEMORY = "out_of_memory"  # too long to be scored in the memory there is


class SkipReason(StrEnum):
    """Why a record is passed over without being a loss."""

    TOMBSTONE = "tombstone"  # a Kafka record without a value
    BLANK = "blank"  # an empty line or value
