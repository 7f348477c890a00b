"""What llama-cpp-python lets crash, hang or be silent, mended around it when it is imported.

The bindings hand whatever they hold to C: a null pointer for a grammar that cannot be parsed, freed memory after
`close()`, logits that are not there. Here each becomes an exception with a message. What llama.cpp gives as its reason
comes with it, and a forked child computes in a thread of its own, where OpenMP finds no threads of the parent's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tesseraq_gguf.errors import BindingsError, ChatTemplateError, ModelLoadError
from tesseraq_gguf.printing import printable
from tesseraq_gguf.runtime.log import first_reason
from tesseraq_gguf.runtime.threads import usable_cores

_ERROR, _CONTINUED = 4, 5  # GGML_LOG_LEVEL_* of ggml.h; the bindings' own table is one off
_NO_REASON = "it gives no reason"
_COMPUTING = ("llama_decode", "llama_encode", "llama_init_from_model", "llama_model_load_from_file")
"""Functions of C that may start threads."""


def guard(module: Any, on_gpu: bool = False) -> None:
    """Put the guards around a freshly imported `llama_cpp`.

    Args:
        module: the package.
        on_gpu: whether its libraries use GPUs, which a forked process has to leave to its parent.
    """
    log = _Log(module)
    module._tesseraq_log = log  # C calls it as long as the process lives
    api, internals = module.llama_cpp, module._internals
    for name in _COMPUTING:
        function = _ForkSafe(getattr(api, name), on_gpu)
        setattr(api, name, function)
        setattr(module, name, function)
    _guard_handles(internals)
    _guard_model(internals.LlamaModel, api, log)
    _guard_context(internals.LlamaContext, api, log)
    _guard_batch(internals.LlamaBatch)
    _guard_sampler(internals, api, log)
    _guard_templates(module.llama_chat_format.Jinja2ChatFormatter)
    _guard_llama(module.Llama, internals.LlamaContext, api)


class _Log:
    """llama.cpp's log: printed as the bindings' `verbose` wants it, errors anyway, unless someone asks for them."""

    def __init__(self, module: Any) -> None:
        self._logger = module._logger.logger
        self._listeners: list[list[str]] = []
        self._notes: list[str] | None = None
        self._level = 0
        self._callback = module.llama_log_callback(self._take)
        module.llama_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _data: Any) -> None:
        if level != _CONTINUED:
            self._level = level
        said = text.decode("utf-8", "replace")
        if self._notes is not None:
            self._notes.append(said)
        if self._level == _ERROR:
            for listener in self._listeners:
                listener.append(said)
        if self._logger.level <= logging.DEBUG or (self._level == _ERROR and not self._listeners):
            print(printable(said, "\n\t"), end="", flush=True, file=sys.stderr)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Callable[[], str]]:
        """Keep errors from the terminal; gives a function that says why the body failed."""
        heard: list[str] = []
        self._listeners.append(heard)
        try:
            yield lambda: printable(first_reason("".join(heard).splitlines()) or _NO_REASON)
        finally:
            self._listeners.remove(heard)

    @contextlib.contextmanager
    def noted(self) -> Iterator[Callable[[], str]]:
        """Note all that is said, at every level; gives a function that returns it."""
        self._notes = notes = list[str]()
        try:
            yield lambda: "".join(notes)
        finally:
            self._notes = None


class _ForkSafe:
    """A function of C that may use OpenMP, whose pool of threads does not survive a fork.

    The pool belongs to the thread that computes, and libgomp waits for its threads for ever where they are gone. So in
    a forked child one new thread computes, which gets a pool of its own.
    """

    _worker: concurrent.futures.ThreadPoolExecutor | None = None
    _used = _inherited = False
    _registered = False

    def __init__(self, function: Any, on_gpu: bool) -> None:
        self._function = function
        self._on_gpu = on_gpu
        if not _ForkSafe._registered and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_ForkSafe._forked)
            _ForkSafe._registered = True

    @staticmethod
    def _forked() -> None:
        _ForkSafe._inherited = _ForkSafe._used
        _ForkSafe._worker = concurrent.futures.ThreadPoolExecutor(1, "llama.cpp")

    def __call__(self, *arguments: Any) -> Any:
        _ForkSafe._used = True
        if _ForkSafe._worker is None:
            return self._function(*arguments)
        if self._on_gpu and _ForkSafe._inherited:
            raise BindingsError(
                "a forked process cannot use the GPU that its parent uses: load the model in the child alone, or let "
                "multiprocessing start processes by 'spawn'"
            )
        future = _ForkSafe._worker.submit(self._function, *arguments)
        try:
            return future.result()
        except BaseException:
            concurrent.futures.wait([future])  # C goes on after Ctrl-C; nobody may free what it works on
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


class _Held:
    """A pointer of C that an object holds until it is closed.

    Args:
        name: the attribute.
        owner: the attribute that becomes None when the object is closed, and the pointer worthless.
    """

    def __init__(self, name: str, owner: str) -> None:
        self._name, self._owner = name, owner

    def __get__(self, instance: Any, _type: type | None = None) -> Any:
        if instance is None:
            return self
        values = vars(instance)
        if values.get(self._owner) is None:
            raise BindingsError("the model is closed, or was never loaded: load it again to use it")
        return values[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


def _guard_handles(internals: Any) -> None:
    for kind, names, owner in (
        (internals.LlamaModel, ("model", "vocab"), "model"),
        (internals.LlamaContext, ("ctx", "memory"), "ctx"),
        (internals.LlamaBatch, ("batch",), "batch"),
        (internals.LlamaSampler, ("sampler",), "sampler"),
    ):
        for name in names:
            setattr(kind, name, _Held(name, owner))


def _guard_model(model: Any, api: Any, log: _Log) -> None:
    begin = model.__init__

    @functools.wraps(begin)
    def init(self: Any, *, path_model: str, params: Any, verbose: bool = True) -> None:
        with log.listen() as reason:
            try:
                begin(self, path_model=path_model, params=params, verbose=verbose)
            except UnicodeEncodeError:
                raise ModelLoadError(f"{printable(path_model)} cannot be loaded: its path is not UTF-8") from None
            except ValueError as error:
                raise ModelLoadError(f"llama.cpp cannot load {path_model}: {reason()}") from error

    def tokenize(self: Any, text: bytes, add_bos: bool, special: bool) -> list[int]:
        # the bindings make room for the context that the file says the model was trained on, whatever that is
        room = len(text) + 8
        while True:
            tokens = (api.llama_token * room)()
            count = api.llama_tokenize(self.vocab, text, len(text), tokens, room, add_bos, special)
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise BindingsError(f"a text of {len(text):,} bytes cannot be made tokens of")
            room = -count

    def token_get_text(self: Any, token: int) -> str:
        return str(api.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace"))

    def metadata(self: Any) -> dict[str, str]:
        def text(function: Any, index: int) -> str:
            size = function(self.model, index, None, 0) + 1
            buffer = ctypes.create_string_buffer(max(1, size))
            function(self.model, index, buffer, len(buffer))
            return buffer.value.decode("utf-8", "replace")

        return {
            text(api.llama_model_meta_key_by_index, index): text(api.llama_model_meta_val_str_by_index, index)
            for index in range(api.llama_model_meta_count(self.model))
        }

    model.__init__ = init
    model.tokenize = tokenize
    model.token_get_text = token_get_text
    model.metadata = metadata


def _guard_context(context: Any, api: Any, log: _Log) -> None:
    begin = context.__init__
    decode, encode = context.decode, context.encode
    context._automatic_flash = False

    @functools.wraps(begin)
    def init(self: Any, *, model: Any, params: Any, verbose: bool = True) -> None:
        if context._automatic_flash:
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        with log.listen() as reason:
            try:
                begin(self, model=model, params=params, verbose=verbose)
            except ValueError as error:
                raise ModelLoadError(
                    f"llama.cpp cannot make a context of {params.n_ctx:,} tokens for {model.path_model}: {reason()}"
                ) from error

    def with_reason(compute: Any) -> Any:
        @functools.wraps(compute)
        def run(self: Any, batch: Any) -> None:
            with log.listen() as reason:
                try:
                    compute(self, batch)
                except BindingsError:
                    raise
                except RuntimeError as error:
                    raise BindingsError(f"llama.cpp cannot compute: {error} ({reason()})") from error

        return run

    context.__init__ = init
    context.decode = with_reason(decode)
    context.encode = with_reason(encode)


def _guard_batch(batch: Any) -> None:
    for name in ("set_batch", "add_sequence"):
        fill = getattr(batch, name)

        @functools.wraps(fill)
        def checked(self: Any, tokens: Any, *rest: Any, _fill: Any = fill, _name: str = name, **named: Any) -> None:
            held = self.batch.n_tokens if _name == "add_sequence" else 0
            if not len(tokens):
                raise BindingsError("there is nothing to compute: the prompt has no tokens")
            if held + len(tokens) > self._n_tokens:
                raise BindingsError(f"a batch of {self._n_tokens:,} tokens has no room for {len(tokens):,} more")
            _fill(self, tokens, *rest, **named)

        def by_name(self: Any, batch: Any, *rest: Any, _checked: Any = checked, **named: Any) -> None:
            _checked(self, batch, *rest, **named)

        setattr(batch, name, functools.wraps(fill)(by_name))


def _guard_sampler(internals: Any, api: Any, log: _Log) -> None:
    sampler = internals.LlamaSampler
    clone = sampler.clone
    sampler._constrained = False

    def constrained(method: Any) -> Any:
        @functools.wraps(method)
        def add(self: Any, model: Any, grammar: Any, *rest: Any, **named: Any) -> None:
            pointers: list[Any] = []
            chain_add = api.llama_sampler_chain_add
            with log.listen() as reason, _stderr() as said:
                api.llama_sampler_chain_add = lambda _chain, added: pointers.append(added)
                try:
                    method(self, model, grammar, *rest, **named)
                finally:
                    api.llama_sampler_chain_add = chain_add
            if not pointers or not pointers[0]:
                why = first_reason(said()) or reason()
                raise BindingsError(f"the grammar cannot be used: {printable(why)}")
            chain_add(self.sampler, pointers[0])
            self._constrained = True

        return add

    def sample(self: Any, ctx: Any, idx: int = -1) -> int:
        with log.listen() as reason:
            row = api.llama_get_logits_ith(ctx.ctx, idx)
            if not row:
                raise BindingsError(f"there are no answers to choose from: {reason()}")
        logits = np.ctypeslib.as_array(row, (ctx.model.n_vocab(),))
        if np.isnan(logits.max()):
            raise BindingsError("the model's answers are not numbers (NaN): its file is broken")
        if not self._constrained:
            return int(api.llama_sampler_sample(self.sampler, ctx.ctx, idx))
        # C ends the process if the grammar forbids what was chosen, as it does where it forbids everything
        candidates = internals.LlamaTokenDataArray(n_vocab=len(logits))
        candidates.copy_logits(logits)
        array = candidates.candidates
        array.selected = -1
        api.llama_sampler_apply(self.sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        if chosen is None or chosen.logit == -np.inf:
            raise BindingsError("the grammar allows none of the model's tokens here")
        api.llama_sampler_accept(self.sampler, chosen.id)
        return int(chosen.id)

    def cloned(self: Any) -> Any:
        other = clone(self)
        other._constrained = self._constrained
        return other

    sampler.add_grammar = constrained(sampler.add_grammar)
    sampler.add_grammar_lazy_patterns = constrained(sampler.add_grammar_lazy_patterns)
    sampler.sample = sample
    sampler.clone = functools.wraps(clone)(cloned)


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], list[str]]]:
    """Collect what C writes to stderr, where the parser of grammars says what it thinks of one; gives the lines."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        try:
            before = os.dup(2)
        except OSError:  # it is closed
            yield lambda: lines
            return
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()


def _guard_templates(formatter: Any) -> None:
    begin, call = formatter.__init__, formatter.__call__

    @functools.wraps(begin)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        self._refused = None
        try:
            begin(self, *arguments, **named)
        except Exception as error:  # jinja2's own, and whatever deep nesting or odd values lead to
            self._refused = error  # a model with a broken template can still go on with texts

    @functools.wraps(call)
    def render(self: Any, **named: Any) -> Any:
        try:
            if self._refused is not None:
                raise self._refused
            response = call(self, **named)
        except Exception as error:
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ChatTemplateError(f"the chat template cannot be used: {printable(said)}") from error
        if not response.prompt:
            raise ChatTemplateError("the chat template cannot be used: it makes nothing of these messages")
        # without a token that ends texts its name is empty, and every answer would end where that is found
        response.stop = [stop for stop in response.stop or () if stop]
        return response

    formatter.__init__ = init
    formatter.__call__ = render


def _guard_llama(llama: Any, context: Any, api: Any) -> None:
    begin, generate, sample, getstate = llama.__init__, llama.generate, llama.sample, llama.__getstate__

    @functools.wraps(begin)
    def init(self: Any, model_path: Any, *, flash_attn: bool | None = False, **named: Any) -> None:
        path = os.fspath(model_path)
        self._stack = contextlib.ExitStack()  # which its end closes, however far it came
        if not Path(path).exists():
            raise ModelLoadError(f"no file at {path}")
        context._automatic_flash = flash_attn is None
        try:
            for threads in ("n_threads", "n_threads_batch"):
                named[threads] = named.get(threads) or usable_cores()
            begin(self, path, flash_attn=bool(flash_attn), **named)
        finally:
            context._automatic_flash = False

    @functools.wraps(generate)
    def checked(self: Any, tokens: Any, *arguments: Any, **named: Any) -> Any:
        tokens = list(tokens)
        if not tokens:
            raise BindingsError("there is nothing to go on from: the prompt has no tokens")
        return generate(self, tokens, *arguments, **named)

    @functools.wraps(sample)
    def sampled(self: Any, *arguments: Any, **named: Any) -> int:
        if not self.n_tokens:
            raise BindingsError("there are no answers to choose from: nothing was computed yet")
        return int(sample(self, *arguments, **named))

    def state(self: Any) -> dict[str, Any]:
        given: dict[str, Any] = getstate(self)
        if self.context_params.flash_attn_type == api.LLAMA_FLASH_ATTN_TYPE_AUTO:
            given["flash_attn"] = None
        return given

    llama.__init__ = init
    llama.generate = checked
    llama.sample = sampled
    llama.__getstate__ = functools.wraps(getstate)(state)
