import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri, PathUri, parse_uri

HOSTS = st.sampled_from(["localhost", "10.0.0.1", "kafka-0.kafka.svc", "[::1]", "[fe80::1]"])
SERVERS = st.lists(
    st.tuples(HOSTS, st.integers(1, 65535)).map(lambda pair: f"{pair[0]}:{pair[1]}"), min_size=1
)
TOPICS = st.from_regex(r"[A-Za-z0-9._-]{1,249}", fullmatch=True).filter(
    lambda topic: topic not in (".", "..")
)


@given(
    SERVERS,
    TOPICS,
    st.sampled_from(["earliest", "latest"]) | st.integers(0, 10**6),
    st.sampled_from(["latest", "none"]) | st.integers(10**6, 2**63 - 1),
)
def test_every_part_of_a_kafka_uri_is_read(
    servers: list[str], topic: str, start: str | int, end: str | int
) -> None:
    uri = parse_uri(f"kafka://{','.join(servers)}/{topic}?start={start}&end={end}")
    assert uri == KafkaUri(tuple(servers), topic, start, None if end == "none" else end)


def test_a_topic_is_read_from_its_beginning_and_without_end() -> None:
    assert parse_uri("kafka://a:1,b:2/logs") == KafkaUri(("a:1", "b:2"), "logs", "earliest", None)
    assert parse_uri("kafka://a:1/logs?end=latest") == KafkaUri(
        ("a:1",), "logs", "earliest", "latest"
    )


@given(SERVERS, TOPICS)
def test_a_kafka_uri_is_written_as_it_is_read(servers: list[str], topic: str) -> None:
    uri = KafkaUri(tuple(servers), topic)
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize("path", ["a.jsonl", "/x/y/*.jsonl.gz", "C:/logs", "kafka:/no", "a b?c"])
def test_what_has_no_scheme_is_a_path(path: str) -> None:
    assert parse_uri(path) == PathUri(path)
    assert str(parse_uri(path)) == path


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "not a path"),
        ("a\0b", "not a path"),
        ("s3://bucket/key", "s3:// is not supported"),
        ("KAFKA://a:1/t", "KAFKA:// is not supported"),
        ("kafka://", "'' is not host:port"),
        ("kafka:///t", "'' is not host:port"),
        ("kafka://a/t", "'a' is not host:port"),
        ("kafka://a:0/t", "'a:0' is not host:port"),
        ("kafka://a:65536/t", "'a:65536' is not host:port"),
        ("kafka://a:1,/t", "'' is not host:port"),
        ("kafka://user@a:1/t", "'user@a:1' is not host:port"),
        ("kafka://a:1", "'' is not a topic name"),
        ("kafka://a:1/", "'' is not a topic name"),
        ("kafka://a:1/..", "'..' is not a topic name"),
        ("kafka://a:1/t/u", "'t/u' is not a topic name"),
        ("kafka://a:1/" + "t" * 250, "is not a topic name"),
        ("kafka://a:1/t#f", "'t#f' is not a topic name"),
        ("kafka://a:1/t?begin=3", "unknown option 'begin'"),
        ("kafka://a:1/t?start=1&start=2", "twice"),
        ("kafka://a:1/t?start=none", "start='none' is wrong"),
        ("kafka://a:1/t?start=-1", "start='-1' is wrong"),
        ("kafka://a:1/t?start=", "start='' is wrong"),
        ("kafka://a:1/t?end=earliest", "end='earliest' is wrong"),
        ("kafka://a:1/t?end=9223372036854775808", "is wrong"),
        ("kafka://a:1/t?start=5&end=4", "end 4 is before start 5"),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(uri: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_uri(uri)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for uri in (text, f"kafka://{text}", f"kafka://a:1/{text}", f"kafka://a:1/t?{text}"):
        try:
            parse_uri(uri)
        except ConfigurationError as error:
            assert "\n" not in str(error)
