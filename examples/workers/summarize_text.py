#!/usr/bin/env python3
"""Python worker of the action `summarize_text`: extractive summary of an English text.

It ranks the sentences by the frequencies of their terms, selects the best ones while avoiding
redundancy (SumBasic), and returns them in their original order, with key terms and readability
scores. It reports progress by sentence, saves checkpoints, streams each sentence of the summary as
output, and stops when it is cancelled. It uses only the standard library and the worker SDK in
`clients/python`:

    pip install ./clients/python
    streamer token --permissions 'worker:*' > worker.token
    export STREAMER_TOKEN_FILE=worker.token
    python examples/workers/summarize_text.py
    streamer submit summarize_text --payload '{"text":"…","sentences":3}'
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import logging
import math
import os
import re
import sys
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

from streamer import Context, InvalidPayload, Token, Worker, WorkerRefused, token_file

DESCRIPTION = "Summarizes a text: its best sentences, key terms and readability"
SCHEMA = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string", "minLength": 1, "description": "English text to summarize"},
        "sentences": {"type": "integer", "minimum": 1, "maximum": 50, "default": 3},
        "key_terms": {"type": "integer", "minimum": 0, "maximum": 50, "default": 8},
        "pause_ms": {
            "type": "integer",
            "minimum": 0,
            "maximum": 10000,
            "default": 0,
            "description": "Delay per sentence in milliseconds, to watch the progress",
        },
    },
}
# Maximum number of progress reports; a checkpoint is saved with each.
MAX_REPORTS = 100
# Maximum number of best sentences to select from, which bounds the checkpoint.
MAX_CANDIDATES = 500
WORDS_PER_MINUTE = 238

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# A sentence ends at . ! or ? (and a closing quote or bracket) before the start of the next
# sentence, and at an empty line.
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])|\n\s*\n")
ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|No|Fig|approx)|\b[A-Z])\.$"
)
VOWELS = re.compile(r"[aeiouyáéíóúäëïöü]+")

# Words that do not indicate the topic of a text.
STOP_WORDS_TEXT = """
    a about above after again against all also although always am among an and any are as at be
    became because become been before being below between both but by can cannot could did do does
    doing done down during each either else ever every few for from further get got had has have
    having he her here hers herself him himself his how however i if in indeed into is it its itself
    just least less like made make many may me might more most much must my myself neither never no
    nor not now of off often on once one only or other others our ours ourselves out over own
    perhaps quite rather s same shall she should since so some still such t than that the their
    theirs them themselves then there these they this those though through thus to too two under
    until up upon us very was we well were what when where whether which while who whom whose why
    will with within without would yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(STOP_WORDS_TEXT.split())


class Candidate(NamedTuple):
    """Sentence that may be selected for the summary."""

    score: float
    position: int


async def summarize_text(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Handles the action `summarize_text`."""
    text, limit = payload.get("text"), int(payload.get("sentences", 3))
    if not isinstance(text, str) or not text.strip():
        raise InvalidPayload("payload.text", "must be a non-empty string")
    # Runs in a thread, because a text of megabytes takes a second and would block the worker.
    sentences = await asyncio.to_thread(split_sentences, text)
    frequencies = await asyncio.to_thread(count_terms, sentences)
    pause = payload.get("pause_ms", 0) / 1000
    candidates = await rank(context, sentences, frequencies, pause)
    selected = sorted(await asyncio.to_thread(select, candidates, sentences, frequencies, limit))
    for position, index in enumerate(selected):
        await context.output(sentences[index] + "\n")
        message = f"sentence {position + 1} of {len(selected)} of the summary"
        await context.progress(round(95 + 5 * (position + 1) / len(selected), 1), message)
    key_terms = frequencies.most_common(int(payload.get("key_terms", 8)))
    return {
        "summary": " ".join(sentences[index] for index in selected),
        "sentences": [{"index": index, "text": sentences[index]} for index in selected],
        "key_terms": [{"term": term, "count": count} for term, count in key_terms],
        "readability": await asyncio.to_thread(readability, text, sentences),
    }


async def rank(
    context: Context, sentences: list[str], frequencies: Counter[str], pause: float
) -> list[Candidate]:
    """Returns the best sentences by the mean frequency of their terms, with a small bonus for those
    near the beginning. A later attempt resumes from the checkpoint of the previous attempt."""
    checkpoint = context.checkpoint or {"next": 0, "best": []}
    best = [Candidate(score, index) for score, index in checkpoint["best"]]
    heapq.heapify(best)
    sentences_per_report = math.ceil(len(sentences) / MAX_REPORTS)
    for index in range(checkpoint["next"], len(sentences)):
        if pause:
            await context.sleep(pause)
        scored = Candidate(score(sentences[index], index, frequencies), index)
        if len(best) < MAX_CANDIDATES:
            heapq.heappush(best, scored)
        else:
            heapq.heappushpop(best, scored)
        done = index + 1
        if done % sentences_per_report == 0 or done == len(sentences):
            context.raise_if_cancelled()
            message = f"sentence {done} of {len(sentences)} ranked"
            percentage = round(95 * done / len(sentences), 1)
            await context.progress(percentage, message, {"sentences": done})
            await context.save_checkpoint({"next": done, "best": best})
    return best


def score(sentence: str, position: int, frequencies: Counter[str]) -> float:
    """Returns the relevance of a sentence to the topic of the text."""
    total = frequencies.total() or 1
    relevance = mean([frequencies[term] / total for term in terms(sentence)])
    return round(relevance * (1 + 0.3 / (1 + position)), 8)


def mean(weights: list[float]) -> float:
    """Returns the mean weight of a sentence's terms, lower for sentences with few terms."""
    return sum(weights) / (len(weights) + 5)


def select(
    candidates: list[Candidate], sentences: list[str], frequencies: Counter[str], limit: int
) -> list[int]:
    """Returns the indexes of the sentences of the summary. The selection of a sentence reduces the
    weights of its terms, so that the next sentence covers other terms."""
    total = frequencies.total() or 1
    weights = {term: count / total for term, count in frequencies.items()}
    remaining = set(candidates)
    selected: list[int] = []

    def value(candidate: Candidate) -> tuple[float, int]:
        novelty = mean([weights[term] for term in terms(sentences[candidate.position])])
        return (novelty * candidate.score, -candidate.position)

    while remaining and len(selected) < limit:
        best = max(remaining, key=value)
        remaining.remove(best)
        selected.append(best.position)
        for term in set(terms(sentences[best.position])):
            weights[term] **= 2
    return selected


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences, each on one line."""
    sentences: list[str] = []
    begin = 0
    for end in SENTENCE_END.finditer(text):
        sentence = text[begin : end.start()]
        if ABBREVIATION.search(sentence) and "\n\n" not in end.group():
            continue
        sentences.append(text[begin : end.end()])
        begin = end.end()
    sentences.append(text[begin:])
    joined = (" ".join(sentence.split()) for sentence in sentences)
    return [sentence for sentence in joined if WORD.search(sentence)] or [" ".join(text.split())]


def count_terms(sentences: list[str]) -> Counter[str]:
    """Counts the occurrences of each term."""
    return Counter(term for sentence in sentences for term in terms(sentence))


def terms(sentence: str) -> list[str]:
    """Returns the words of a sentence that indicate its topic."""
    words = (word.lower().replace("’", "'") for word in WORD.findall(sentence))
    stems = (word.removesuffix("'s") for word in words)
    return [stem for stem in stems if len(stem) > 2 and stem not in STOP_WORDS]


def readability(text: str, sentences: list[str]) -> dict[str, Any]:
    """Returns sizes, reading time, and the two Flesch readability scores (Kincaid et al., 1975)."""
    words = WORD.findall(text)
    if not words:
        return {"sentences": len(sentences), "words": 0, "characters": len(text)}
    syllables = sum(syllable_count(word) for word in words)
    length, density = len(words) / len(sentences), syllables / len(words)
    return {
        "sentences": len(sentences),
        "words": len(words),
        "characters": len(text),
        "words_per_sentence": round(length, 1),
        "syllables_per_word": round(density, 2),
        "flesch_reading_ease": round(206.835 - 1.015 * length - 84.6 * density, 1),
        "flesch_kincaid_grade": round(0.39 * length + 11.8 * density - 15.59, 1),
        "reading_minutes": round(len(words) / WORDS_PER_MINUTE, 1),
    }


def syllable_count(word: str) -> int:
    """Counts the syllables of an English word: its groups of vowels, without a silent e."""
    lower = word.lower()
    count = len(VOWELS.findall(lower))
    if lower.endswith("e") and not lower.endswith(("le", "ee")) and count > 1:
        count -= 1
    return max(count, 1)


def read_arguments() -> argparse.Namespace:
    """Parses the command line."""
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = os.environ.get("STREAMER_SERVER", "http://127.0.0.1:8080")
    parser.add_argument("--server", default=server, metavar="URL", help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=4, help="concurrency; default: %(default)s")
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="time limit for running attempts after SIGTERM; default: %(default)s",
    )
    parser.add_argument(
        "--token-command",
        metavar="COMMAND",
        help="command that prints a valid token, run whenever one is required; without it, the file"
        " STREAMER_TOKEN_FILE is read each time, or STREAMER_TOKEN is used until it expires",
    )
    arguments = parser.parse_args()
    configured = os.environ.get("STREAMER_TOKEN_FILE") or os.environ.get("STREAMER_TOKEN")
    if not arguments.token_command and not configured:
        parser.error("set STREAMER_TOKEN_FILE, STREAMER_TOKEN or --token-command")
    return arguments


async def command_output(command: str) -> str:
    """Returns the output of a shell command. Raises RuntimeError if it fails."""
    shell = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
    output, _ = await shell.communicate()
    if shell.returncode != 0:
        raise RuntimeError(f"the token command exited with status {shell.returncode}")
    return output.decode().strip()


def token_from(arguments: argparse.Namespace) -> Token:
    """Returns the source of tokens, or the configured token."""
    if arguments.token_command:
        return partial(command_output, arguments.token_command)
    file = os.environ.get("STREAMER_TOKEN_FILE")
    return token_file(file) if file else os.environ["STREAMER_TOKEN"]


def main() -> int:
    """Runs the worker until SIGTERM or Ctrl-C."""
    arguments = read_arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    worker = Worker(arguments.server, token_from(arguments), slots=arguments.slots)
    declare = worker.action(
        "summarize_text",
        description=DESCRIPTION,
        estimated_duration=30,
        heartbeat_timeout=60,
        payload_schema=SCHEMA,
    )
    declare(summarize_text)
    print(f"Worker {worker.worker_id} runs summarize_text for {arguments.server}", flush=True)
    try:
        worker.run(grace=arguments.grace)
    except WorkerRefused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
