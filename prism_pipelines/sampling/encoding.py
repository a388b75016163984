"""Texts and chats as token ids, the same way in generation, training, scoring, calibration and lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from ..models.families import MDMSpec
from ..models.protocols import Tokenizer

Chat = Sequence[Mapping[str, Any]]  # messages, each {"role": ..., "content": ...}

TRAIN_ON = ("last_turn", "all_turns")


class Frame(NamedTuple):
    """Ids before and after every text that a model was trained on, such as [CLS] and [SEP]."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


NO_FRAME = Frame()


class Spans(NamedTuple):
    """A text, and the parts of it that an assistant wrote, as (first character, end)."""

    text: str
    answers: list[tuple[int, int]]


def as_texts(source: Any) -> list[str] | None:
    """A text, or a list or tuple of texts, as a list; None for anything else."""
    texts = [source] if isinstance(source, str) else source
    return list(texts) if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts) else None


def has_chat_template(tokenizer: Tokenizer | None) -> bool:
    """Does the tokenizer, if there is one, have a chat template?"""
    return bool(getattr(tokenizer, "chat_template", None))


def text_frame(tokenizer: Tokenizer | None, spec: MDMSpec) -> Frame:
    """The special tokens at the beginning and end of an encoder's texts; empty for language models.

    An encoder takes a padding mask (`MDMSpec.mask_format`), and its tokenizer closes every text. Such a model was
    trained on one sequence a row with these tokens around it, so they are always given. A model with a chat template
    is a language model, whatever its class: it learns where an answer ends.

    Args:
        tokenizer: the model's tokenizer, or None.
        spec: facts about the model.
    """
    if tokenizer is None or spec.mask_format != "padding" or has_chat_template(tokenizer):
        return NO_FRAME
    (opening,) = prompt_ids([""], tokenizer)
    closing = tokenizer("").input_ids[len(opening) :]
    return Frame(tuple(opening), tuple(closing)) if closing else NO_FRAME


def prompt_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of texts to continue: with the tokens that the tokenizer puts before a text, without those after it.

    A closing token that the tokenizer adds ([SEP], </s>) is left out. An opening token is left out if a chat template
    has written it already.
    """
    return [tokenizer(text).input_ids[kept_ids(text, tokenizer)] for text in texts]


def kept_ids(text: str, tokenizer: Tokenizer) -> slice:
    """Which of the ids of a text `prompt_ids` keeps."""
    openers = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    closers = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    ids, bare = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    first, end = 0, len(ids)
    while end > len(bare) and ids[end - 1] in closers:
        if (bare and ids[end - len(bare) : end] == bare) or (end == 1 and ids[0] in openers):
            break  # the text itself has this token, or the tokenizer also opens texts with it
        end -= 1
    if end > len(bare) and bare and bare[0] == ids[0] and ids[0] in openers:
        first = 1
    return slice(first, end)


def whole_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole text with the tokenizer's special tokens around it ([CLS] ... [SEP]), but none of them twice."""
    ids, bare = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) == len(bare) or not bare:
        return ids
    front = next((n for n in range(len(ids) - len(bare) + 1) if ids[n : n + len(bare)] == bare), None)
    if front is None:
        return ids
    back = len(ids) - len(bare) - front
    start = ids[:front] if bare[:front] != ids[:front] else []
    end = ids[len(ids) - back :] if back and bare[len(bare) - back :] != ids[len(ids) - back :] else []
    return [*start, *bare, *end]


# --- chats ------------------------------------------------------------------------------------------------------------


def chat_prompt(
    prompt: Any,
    messages: Chat | Sequence[Chat] | None,
    tokenizer: Tokenizer | None,
    use_chat_template: bool,
    template_kwargs: Mapping[str, Any] | None,
    continue_final_message: bool,
) -> Any:
    """What the model reads for `prompt` or `messages`: texts by the chat template, or `prompt` as it is.

    Args:
        prompt, messages, template_kwargs, continue_final_message: as `chat_texts`; `prompt` and `messages` may both be
            None.
        tokenizer: the model's tokenizer, or None.
        use_chat_template: False takes `prompt` as it is, even if the tokenizer has a template.
    Raises:
        ValueError, TypeError: as `chat_texts`; or template settings without a template in use.
    """
    if messages is not None or (prompt is not None and use_chat_template and has_chat_template(tokenizer)):
        return chat_texts(messages, prompt, tokenizer, template_kwargs, continue_final_message)
    if continue_final_message:
        raise ValueError("`continue_final_message` goes with `messages` whose last is the assistant's.")
    if template_kwargs:
        raise ValueError("`chat_template_kwargs` is given, and no chat template is used: pass `messages`.")
    return prompt


def chat_texts(
    messages: Chat | Sequence[Chat] | None,
    prompt: Any,
    tokenizer: Tokenizer | None,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> list[str]:
    """Chats as the template writes them, up to the place where the answer begins or continues.

    Args:
        messages: a chat, list of {"role", "content"}, or a list of chats; or None.
        prompt: instead of `messages`, a text or texts, each a chat of one user message.
        tokenizer: one with a chat template.
        template_kwargs: further arguments of the template, such as {"enable_thinking": False}.
        continue_final_message: the last message is the assistant's and begins the answer (prefill).
    Raises:
        ValueError: both `messages` and `prompt`, no template, no valid chat, or no assistant message to continue.
        TypeError: `prompt` is no text.
    """
    if messages is not None and prompt is not None:
        raise ValueError("Pass either `prompt` or `messages`, not both.")
    if tokenizer is None or not has_chat_template(tokenizer):
        raise ValueError("`messages` needs a tokenizer with a chat template; this one has none. Pass `prompt`.")
    chats: Sequence[Any]
    if prompt is not None:
        texts = as_texts(prompt)
        if texts is None:
            raise TypeError("`prompt` must be a text or texts for the chat template. Pass ids as `input_ids`.")
        chats = [[{"role": "user", "content": text}] for text in texts]
    else:
        chats = messages if isinstance(messages, (list, tuple)) else [messages]
        chats = chats if chats and isinstance(chats[0], (list, tuple)) else [chats]
        if not all(chat and all(isinstance(turn, dict) and "role" in turn for turn in chat) for chat in chats):
            raise ValueError(
                '`messages` must be a chat, a list of {"role": ..., "content": ...}, or a list of chats, '
                f"got {messages!r:.80}."
            )
    if continue_final_message:
        for chat in chats:
            if chat[-1]["role"] != "assistant" or not chat[-1].get("content"):
                raise ValueError(
                    "`continue_final_message` needs a last message of the assistant that begins the answer, got "
                    f"{chat[-1]!r:.80}."
                )
    return [written_chat(chat, tokenizer, template_kwargs, continue_final_message) for chat in chats]


def written_chat(
    chat: Chat, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None, continued: bool = False
) -> str:
    """One chat as the template writes it, up to the next answer; or, if `continued`, to the end of the last message."""
    fixed = {"tokenize": False, "add_generation_prompt": not continued, "continue_final_message": continued}
    return tokenizer.apply_chat_template(chat, **{**(template_kwargs or {}), **fixed})


def answer_spans(
    chat: Chat, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None = None, train_on: str = "last_turn"
) -> Spans:
    """A chat that ends with an answer, as the template writes it, and the places of the answers to train on.

    The text before the last answer is exactly the prompt that `chat_texts` gives for generating that answer.

    Args:
        chat: list of {"role", "content"}; the last message is the assistant's.
        tokenizer, template_kwargs: as `chat_texts`.
        train_on: "last_turn", or "all_turns" for every message of the assistant.
    Raises:
        ValueError: no such chat, the template refuses it, or the template changes a turn when others follow it.
    """
    if not (isinstance(chat, (list, tuple)) and all(isinstance(turn, dict) for turn in chat)):
        raise ValueError("`messages` must be a list of role and content.")
    if not chat or chat[-1].get("role") != "assistant":
        raise ValueError("`messages` must end with a message of the assistant, the answer.")
    fixed = {**(template_kwargs or {}), "tokenize": False, "add_generation_prompt": False}
    turns = [i for i, turn in enumerate(chat) if turn.get("role") == "assistant"]
    turns = turns if train_on == "all_turns" else turns[-1:]
    try:
        starts = [written_chat(chat[:i], tokenizer, template_kwargs) for i in turns]
        whole = tokenizer.apply_chat_template(chat, **fixed).rstrip("\n")
        ends = [tokenizer.apply_chat_template(chat[: i + 1], **fixed).rstrip("\n") for i in turns]
    except (jinja2.TemplateError, ValueError, TypeError) as error:  # for example: roles must alternate
        raise ValueError(f"the chat template refuses it: {error}") from None
    if not whole.startswith(starts[-1]):
        raise ValueError(
            "the chat template writes the prompt differently once the answer is there, so the answer cannot be "
            "separated from it. Pass prompt and completion with --no-chat-template."
        )
    if not all(whole.startswith(text) for text in (*starts, *ends)):
        raise ValueError(
            "the chat template writes earlier turns differently once more follow (those of reasoning models drop the "
            "thoughts), so training on them would not match generation. Pass --train-on last_turn."
        )
    return Spans(whole, [(len(start), len(end)) for start, end in zip(starts, ends, strict=True)])


def span_ids(spans: Spans, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of a chat, and whether each belongs to an answer. The ids before the last answer are those of `prompt_ids`.

    Raises:
        ValueError: earlier answers are to be trained on, and the tokenizer gives no character offsets.
    """
    *earlier, (start, end) = spans.answers
    before, answer = spans.text[:start], tokenizer(spans.text[start:end], add_special_tokens=False).input_ids
    (given,) = prompt_ids([before], tokenizer)
    learned = [False] * len(given)
    if earlier:
        if not tokenizer.is_fast:
            raise ValueError("--train-on all_turns needs a fast tokenizer, which gives character offsets.")
        offsets = tokenizer(before, return_offsets_mapping=True).offset_mapping[kept_ids(before, tokenizer)]
        learned = [any(low <= first < last <= high for low, high in earlier) for first, last in offsets]
    return [*given, *answer], learned + [True] * len(answer)
