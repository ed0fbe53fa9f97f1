"""Records become conversations; mistakes name their line, useless records say why they were dropped."""

from __future__ import annotations

import json

import pytest

from research.core.data.json_stream import Record
from research.core.data.messages import Dropped, alpaca_prompt, to_example
from research.core.data.sources import Where
from research.core.errors import DataError


def read(raw, fmt="messages", mindformers=False):
    return to_example(Record(Where("data/set.jsonl", 7, 3), raw, 100), fmt, mindformers)


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_alpaca_with_system_and_history():
    example = read(
        {
            "instruction": "And now?",
            "input": "",
            "output": "Four.",
            "system": "Be short.",
            "history": [["2+1?", "Three."]],
        },
        "alpaca",
    )
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "Be short."),
        ("user", "2+1?"),
        ("assistant", "Three."),
        ("user", "And now?"),
        ("assistant", "Four."),
    ]
    assert example.id == "set-3"


@pytest.mark.parametrize(
    ("instruction", "given", "ours", "mindformers"),
    [
        ("Add these.", "1 2", "Add these.\n1 2", "Add these: 1 2"),
        ("Add these", "1 2", "Add these\n1 2", "Add these: 1 2"),
        ("Tell a joke.", "", "Tell a joke.", "Tell a joke."),
        ("Go on...", "x", "Go on...\nx", "Go on..: x"),
    ],
)
def test_alpaca_prompt_forms(instruction, given, ours, mindformers):
    assert alpaca_prompt(instruction, given) == ours
    assert alpaca_prompt(instruction, given, mindformers=True) == mindformers


def test_sharegpt_roles_and_function_calls():
    example = read(
        {
            "id": 12,
            "tools": json.dumps([{"name": "add", "parameters": {}}]),
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
        },
        "sharegpt",
    )
    assert example.id == 12
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert example.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_both_shapes_of_the_mindformers_converters_are_read():
    first = {"id": "1", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}
    second = {"type": "chatml", **turns(("system", "s"), ("user", "q"), ("assistant", "a"))}
    third = {"type": "chatml", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for raw in (first, second, third):
        assert [m["content"] for m in read(raw).messages][-2:] == ["q", "a"]


@pytest.mark.parametrize(
    ("raw", "fmt", "reason"),
    [
        ({"instruction": "  ", "input": "x", "output": "y"}, "alpaca", "empty instruction"),
        ({"instruction": "", "input": "", "output": ""}, "alpaca", "empty instruction"),
        ({"instruction": "x", "input": "", "output": " \n"}, "alpaca", "empty answer"),
        (turns(("user", ""), ("assistant", "a")), "messages", "empty instruction"),
        (turns(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "")), "messages", "empty answer"),
        (turns(("user", "q")), "messages", "no assistant message"),
        ({"messages": []}, "messages", "no assistant message"),
        (turns(("user", "\ud83d"), ("assistant", "a")), "messages", "surrogate"),
    ],
)
def test_records_that_teach_nothing_are_dropped_with_a_reason(raw, fmt, reason):
    with pytest.raises(Dropped, match=reason):
        read(raw, fmt)


@pytest.mark.parametrize(
    ("raw", "fmt", "says"),
    [
        ({"instruction": "x"}, "alpaca", "no 'output'"),
        ({"instruction": "x", "output": 4}, "alpaca", "'output' must be a string"),
        ({"instruction": None, "output": "y"}, "alpaca", "'instruction' must be a string"),
        ({"instruction": "x", "output": "y", "history": [["only"]]}, "alpaca", "'history'"),
        ({"text": "x"}, "messages", "no list 'messages'"),
        (turns(("asistant", "x")), "messages", "did you mean assistant"),
        (turns((None, "x")), "messages", "role None"),
        (turns(("user", "q"), ("assistant", 3)), "messages", "message 2: the content must be a string"),
        (turns(("user", "q"), ("assistant", None)), "messages", "message 2: the content must be a string"),
        (turns(("user", "q"), ("system", "s"), ("assistant", "a")), "messages", "message 2: the system message"),
        ({"messages": ["q"]}, "messages", "message 1"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "sharegpt", "not JSON"),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]}, "sharegpt", "'arguments'"),
        ({**turns(("user", "q"), ("assistant", "a")), "tools": "["}, "messages", "'tools' is not JSON"),
        ([1], "messages", "must be a JSON object"),
    ],
)
def test_mistakes_in_the_file_are_errors_with_its_line(raw, fmt, says):
    with pytest.raises(DataError) as error:
        read(raw, fmt)
    assert str(error.value.where) == "data/set.jsonl:7"
    assert says in str(error.value)


def test_mindformers_keeps_the_empty_answers_it_trained():
    raw = {"instruction": "x", "input": "", "output": ""}
    assert read(raw, "alpaca", mindformers=True).messages[-1]["content"] == ""
