"""Validation during a run: the trained model, the VAE that turns latents into pictures, and when to make them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from simpletuner.config.root import Config
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.signals import StopRequest
from simpletuner.events.types import ValidationDrift
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.optim.state import averaged_weights
from simpletuner.train.build import Training
from simpletuner.train.prepare import Vae
from simpletuner.validation.drift import FEW_STEPS, MANY_STEPS, drift_requests, measure_drift
from simpletuner.validation.gallery import Gallery
from simpletuner.validation.generate import ImageEngine, SamplingSettings, missing_requests, validate
from simpletuner.validation.requests import ImageRequest


def sampling_settings(config: Config) -> SamplingSettings:
    """How validation images are sampled."""
    options = config.validation
    return SamplingSettings(
        num_steps=options.validation_num_inference_steps,
        guidance=options.validation_guidance,
        shift=options.validation_sampling_shift,
        negative_prompt=options.validation_negative_prompt,
    )


class _StoppedError(Exception):
    """The run is asked to stop while it makes images."""


class Validator:
    """Makes the images of a run. The VAE is loaded at the first use and waits on the CPU in between.

    A request to stop ends a validation between two sampling steps; the images that are finished by then stay.
    """

    def __init__(
        self,
        config: Config,
        *,
        requests: Sequence[ImageRequest],
        training: Training,
        vae: Vae,
        run: RunRecorder,
        stop: StopRequest,
        headings: Callable[[int], str],
    ) -> None:
        """`headings(step)` names a column of the contact sheet."""
        self._config = config
        self._requests = tuple(requests)
        self._training = training
        self._vae = vae
        self._run = run
        self._stop = stop
        self._headings = headings
        self._base_drift: float | None = None
        self._gallery = Gallery(Path(config.run.output_dir), image_format=config.validation.validation_image_format)

    @property
    def sheet(self) -> Path | None:
        """The contact sheet, if there is one."""
        path = self._gallery.sheet
        return path if path.is_file() else None

    def show_base(self) -> None:
        """Make those images of the untrained model that are not there yet."""
        missing = missing_requests(self._requests, self._gallery, step=0, settings=sampling_settings(self._config))
        if missing and not self._config.validation.disable_benchmark:
            self._make(missing, step=0)

    def show(self, step: int) -> None:
        """Make the images of the model after `step` updates, of its averaged weights too where both are wanted."""
        if not self._requests:
            return
        ema, wanted = self._training.ema, self._config.validation.ema_validation
        if ema is None or wanted != "ema_only":
            self._make(self._requests, step=step)
        if ema is not None and wanted != "none" and not self._stop.level:
            with ema.within():
                self._make(self._requests, step=step, is_averaged=True)

    def _make(self, requests: Sequence[ImageRequest], *, step: int, is_averaged: bool = False) -> None:
        training = self._training
        was_training = training.transformer.training
        training.transformer.eval()
        try:
            with suppress(_StoppedError), averaged_weights(training.optimizer):
                self._make_images(requests, step, is_averaged=is_averaged)
                if not is_averaged:
                    self._tell_drift(step)
        finally:
            training.transformer.train(was_training)
            self._vae.park()

    def _make_images(self, requests: Sequence[ImageRequest], step: int, *, is_averaged: bool) -> None:
        settings = sampling_settings(self._config)
        with self._run.phase("validation", total=len(requests) * settings.num_steps, unit="steps") as progress:

            def advance(num_images: int) -> None:
                progress.advance(num_images)
                if self._stop.level:
                    raise _StoppedError

            validate(
                requests,
                step=step,
                heading=self._headings,
                with_adapter=step > 0,
                is_averaged=is_averaged,
                engine=self._engine(),
                settings=settings,
                gallery=self._gallery,
                all_requests=self._requests,
                emit=self._run.emit,
                on_progress=advance,
            )

    def _tell_drift(self, step: int) -> None:
        """Measure the turbo drift of the model after `step` updates, and before the first time that of its base."""
        count = self._config.validation.validation_turbo_drift
        requests = drift_requests(self._requests, count, alignment_px=Z_IMAGE.alignment_px)
        if not requests:
            return
        begun = time.monotonic()
        if self._base_drift is None:
            self._base_drift = self._measure_drift(requests, 0.0)
        drift = self._measure_drift(requests, 1.0) if step else self._base_drift
        self._run.emit(
            ValidationDrift(
                step=step,
                drift=drift,
                base_drift=self._base_drift,
                num_images=len(requests),
                few_steps=FEW_STEPS,
                many_steps=MANY_STEPS,
                seconds=time.monotonic() - begun,
            )
        )

    def _measure_drift(self, requests: Sequence[ImageRequest], strength: float) -> float:
        total = len(requests) * (FEW_STEPS + MANY_STEPS)
        engine, settings = self._engine(), sampling_settings(self._config)
        with self._run.phase("drift", total=total, unit="steps") as progress, engine.strength(strength):

            def advance(num_images: int) -> None:
                progress.advance(num_images)
                if self._stop.level:
                    raise _StoppedError

            return measure_drift(requests, engine=engine, settings=settings, on_progress=advance)

    def _engine(self) -> ImageEngine:
        return ImageEngine(
            velocity=self._training.velocity,
            context_of=self._training.sampling_contexts.get,
            decode=self._vae.decode,
            strength=self._training.sampling,
            latent_channels=Z_IMAGE.latent_channels,
            px_per_latent=Z_IMAGE.vae_factor,
            px_per_token=Z_IMAGE.alignment_px,
            device=self._training.compute.device,
        )
