"""From texts, chats and rows of data to ids: one road for generation, training, scoring, calibration and lm-eval."""

from __future__ import annotations

from typing import NamedTuple

import jinja2

TRAIN_ON = ("last_turn", "all_turns")


class Frame(NamedTuple):
    """Ids that stand before and after every text that a model was trained on, such as [CLS] and [SEP]."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


NO_FRAME = Frame()


class Spans(NamedTuple):
    """A text, and the parts of it, (first character, end), that an assistant wrote."""

    text: str
    answers: list[tuple[int, int]]


def has_chat_template(tokenizer) -> bool:
    """Does a tokenizer, or None, know how a chat is written?"""
    return bool(getattr(tokenizer, "chat_template", None))


def text_frame(tokenizer, spec) -> Frame:
    """The special tokens that an encoder's texts begin and end with; empty for language models.

    An encoder takes a padding mask (`MDMSpec.mask_format`), and its tokenizer closes every text: it was trained on one
    sequence a row, with these tokens around it, and they are always given. A model with a chat template is a language
    model, whatever its class: it learns where an answer ends.

    Args:
        tokenizer: of the model, or None.
        spec: `MDMSpec` of the model.
    """
    if tokenizer is None or spec.mask_format != "padding" or has_chat_template(tokenizer):
        return NO_FRAME
    (opening,) = prompt_ids([""], tokenizer)
    closing = tokenizer("").input_ids[len(opening) :]
    return Frame(tuple(opening), tuple(closing)) if closing else NO_FRAME


def prompt_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Ids of texts that are to be continued: as the tokenizer begins a text, but not ended by it.

    A closing token that the tokenizer adds ([SEP], </s>) is left out, and so is a second opening one where a chat
    template has written it already.
    """
    return [tokenizer(text).input_ids[kept_ids(text, tokenizer)] for text in texts]


def kept_ids(text: str, tokenizer) -> slice:
    """Which of the ids of a text `prompt_ids` keeps."""
    openers = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    closers = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    ids, bare = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    first, end = 0, len(ids)
    while end > len(bare) and ids[end - 1] in closers:
        if (bare and ids[end - len(bare) : end] == bare) or (end == 1 and ids[0] in openers):
            break  # the text's own, or one that opens a text as well
        end -= 1
    if end > len(bare) and bare and bare[0] == ids[0] and ids[0] in openers:
        first = 1
    return slice(first, end)


def whole_ids(text: str, tokenizer) -> list[int]:
    """Ids of a whole text, framed as the tokenizer frames one ([CLS] ... [SEP]), once also where the text says so."""
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
    prompt, messages, tokenizer, use_chat_template: bool, template_kwargs: dict | None, continue_final_message: bool
):
    """What the model reads for `prompt` or `messages`: texts by the chat template, or `prompt` as it is.

    Args:
        prompt, messages, template_kwargs, continue_final_message: as `chat_texts`; both of the first may be None.
        tokenizer: or None.
        use_chat_template: False takes `prompt` as it is, also with a tokenizer that has a template.
    Raises:
        ValueError, TypeError: as `chat_texts`, or settings of a template that is not used.
    """
    if messages is not None or (prompt is not None and use_chat_template and has_chat_template(tokenizer)):
        return chat_texts(messages, prompt, tokenizer, template_kwargs, continue_final_message)
    if continue_final_message:
        raise ValueError("`continue_final_message` goes with `messages` whose last is the assistant's.")
    if template_kwargs:
        raise ValueError("`chat_template_kwargs` is given, and no chat template is used: pass `messages`.")
    return prompt


def chat_texts(
    messages, prompt, tokenizer, template_kwargs: dict | None = None, continue_final_message: bool = False
) -> list[str]:
    """Chats as texts, by the tokenizer's template, up to where the answer begins, or goes on.

    Args:
        messages: a chat, list of {"role", "content"}, or a list of chats; or None.
        prompt: in its place a text or texts, each a chat of one turn.
        tokenizer: with a chat template.
        template_kwargs: what the template is given besides the chat, such as {"enable_thinking": False}.
        continue_final_message: the last message is the assistant's and begins the answer (prefill).
    Raises:
        ValueError: both, no template, what is no chat, or nothing of the assistant's to continue.
        TypeError: `prompt` is no text.
    """
    if messages is not None and prompt is not None:
        raise ValueError("Pass either `prompt` or `messages`, not both.")
    if not has_chat_template(tokenizer):
        raise ValueError("`messages` needs a tokenizer with a chat template; this one has none. Pass `prompt`.")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)):
            raise TypeError("`prompt` must be a text or texts, to go into the chat template; ids are `input_ids`.")
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


def written_chat(chat: list[dict], tokenizer, template_kwargs: dict | None, continued: bool = False) -> str:
    """One chat by the template, up to where the assistant's next answer begins, or its last message goes on."""
    fixed = {"tokenize": False, "add_generation_prompt": not continued, "continue_final_message": continued}
    return tokenizer.apply_chat_template(chat, **{**(template_kwargs or {}), **fixed})


def answer_spans(
    chat: list[dict], tokenizer, template_kwargs: dict | None = None, train_on: str = "last_turn"
) -> Spans:
    """A chat that ends with an answer, by the template, and where the answers to train on stand in it.

    Everything before the last answer is, letter for letter, what `chat_texts` gives to generate it after.

    Args:
        chat: list of {"role", "content"}; the last message is the assistant's.
        tokenizer, template_kwargs: as `chat_texts`.
        train_on: "last_turn", or "all_turns" for every message of the assistant.
    Raises:
        ValueError: it is no such chat, the template refuses it, or writes the turns differently once more follow.
    """
    if not (isinstance(chat, (list, tuple)) and all(isinstance(turn, dict) for turn in chat)):
        raise ValueError("`messages` must be a list of role and content.")
    if not chat or chat[-1].get("role") != "assistant":
        raise ValueError("it must end with a message of the assistant, the answer.")
    fixed = {**(template_kwargs or {}), "tokenize": False, "add_generation_prompt": False}
    turns = [i for i, turn in enumerate(chat) if turn.get("role") == "assistant"]
    turns = turns if train_on == "all_turns" else turns[-1:]
    try:
        starts = [written_chat(chat[:i], tokenizer, template_kwargs) for i in turns]
        whole = tokenizer.apply_chat_template(chat, **fixed).rstrip("\n")
        ends = [tokenizer.apply_chat_template(chat[: i + 1], **fixed).rstrip("\n") for i in turns]
    except (jinja2.TemplateError, ValueError, TypeError) as error:  # such as: roles must alternate, or no message
        raise ValueError(f"the chat template refuses it: {error}") from None
    if not whole.startswith(starts[-1]):
        raise ValueError(
            "the chat template writes the prompt differently once the answer is there, so the two cannot be told "
            "apart. Pass prompt and completion with --no-chat-template."
        )
    if not all(whole.startswith(text) for text in (*starts, *ends)):
        raise ValueError(
            "the chat template writes earlier turns differently once more follow (a reasoning model's drops its "
            "thoughts), so they cannot be learned as they are generated. Pass --train-on last_turn."
        )
    return Spans(whole, [(len(start), len(end)) for start, end in zip(starts, ends, strict=True)])


def span_ids(spans: Spans, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of a chat, and whether each is of an answer. The ids before the last answer are those of `prompt_ids`.

    Raises:
        ValueError: earlier answers are asked for, and the tokenizer does not say where its tokens stand.
    """
    *earlier, (start, end) = spans.answers
    before, answer = spans.text[:start], tokenizer(spans.text[start:end], add_special_tokens=False).input_ids
    (given,) = prompt_ids([before], tokenizer)
    learned = [False] * len(given)
    if earlier:
        if not tokenizer.is_fast:
            raise ValueError("--train-on all_turns needs a fast tokenizer, which says where its tokens stand.")
        places = tokenizer(before, return_offsets_mapping=True).offset_mapping[kept_ids(before, tokenizer)]
        learned = [any(first <= place[0] < place[1] <= last for first, last in earlier) for place in places]
    return [*given, *answer], learned + [True] * len(answer)
