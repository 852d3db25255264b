"""Converts prompts to token ids and back. Special tokens in a prompt are treated as text."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, Blip2Config

from blip2_serve.errors import InvalidRequest, StartupError


def _byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's byte of each character in a token.

    Printable Latin-1 bytes are their own characters; the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


BYTES = _byte_level_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer, and BLIP-2's layout of a prompt: image tokens, BOS, text.

    The language model's token ids are those below `vocabulary`, which may be more than the
    tokenizer has.

    Raises:
        StartupError: The folder has no tokenizer that can be loaded.
    """

    def __init__(self, folder: Path, config: Blip2Config) -> None:
        try:
            # Otherwise "<image>" in a prompt would become an image position.
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, split_special_tokens=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot load a tokenizer from {folder}: {error}") from error
        self.vocabulary: int = config.text_config.vocab_size
        self._bytes: dict[int, bytes] = {}
        self._image_id = config.image_token_index
        self._bos_id = config.text_config.bos_token_id
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        self._image_tokens = [config.image_token_index] * config.num_query_tokens

    def least_tokens(self, prompt: str) -> int:
        """Returns a lower bound of the prompt's tokens without tokenizing it.

        It assumes that every token is as long as the longest.
        """
        return len(prompt) // self._longest_token

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns [image token] * queries + [BOS] + the prompt's tokens.

        Raises:
            InvalidRequest: The prompt contains an image token that the tokenizer does not split.
        """
        text = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if self._image_id in text:
            raise InvalidRequest("the prompt contains the model's image token", "prompt")
        return [*self._image_tokens, self._bos_id, *text]

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for.

        A special token gives its name, and an id beyond the vocabulary "<id>".
        """
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # the embedding has more rows than the tokenizer has tokens
            return f"<{token_id}>".encode()
        if token_id in self._tokenizer.all_special_ids or not set(piece) <= BYTES.keys():
            return str(piece).encode()
        return bytes(BYTES[character] for character in piece)

    def decode(self, ids: list[int]) -> str:
        """Converts token ids to text; special tokens are skipped.

        Called twice per token: transformers' own `decode` takes nine times as long.
        """
        text: str = self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text
