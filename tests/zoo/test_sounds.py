"""Sounds: WAV files, features, clips of words and recordings of machines."""

from __future__ import annotations

import io
import math
import os
import tarfile
import wave
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge.zoo import speech_commands
from lightning_edge.zoo.anomaly import AnomalyDetector
from lightning_edge.zoo.audio_features import MFCC, log_mel, mel_matrix
from lightning_edge.zoo.keyword_clips import ClipFiles, find_clips
from lightning_edge.zoo.machine_sounds import MachineSoundsDataModule, Windows, windows_of
from lightning_edge.zoo.speech_commands import SpeechCommandsDataModule, unpack
from lightning_edge.zoo.wav_files import read_wav
from lightning_edge.zoo.waveform import WaveformDSCNN


def sound_bytes(samples: np.ndarray, channels: int = 1, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(samples.dtype.itemsize)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


def noise(count: int, seed: int = 0, loudest: int = 3000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-loudest, loudest, count).astype(np.int16)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_wav_files_are_read_as_they_are(tmp_path: Path) -> None:
    samples = noise(500)
    assert np.array_equal(read_wav(write(tmp_path / "a.wav", sound_bytes(samples)), 16_000), samples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (sound_bytes(noise(10), channels=2), r"2 channels, 16 bits and 16000 .* ffmpeg"),
        (sound_bytes(noise(10), rate=8000), "8000 samples in a second; allowed"),
        (sound_bytes(noise(10).astype(np.uint8)), "8 bits"),
        (sound_bytes(noise(1000))[:700], "cut or empty"),
        (sound_bytes(noise(0)), "cut or empty"),
        (b"RIFF", "no WAV file of plain samples: it is cut"),
        (b"x" * 100, "no WAV file of plain samples"),
    ],
)
def test_what_is_no_such_wav_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_wav(write(tmp_path / "a.wav", content), 16_000)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="a named pipe and not a file"):
        read_wav(tmp_path / "a.wav", 16_000)


def test_mfcc_is_what_the_transform_of_each_frame_gives() -> None:
    waveforms = torch.from_numpy(noise(32_000)).float().reshape(2, 16_000)
    frames = (waveforms / waveforms.amax(1, keepdim=True)).double().unfold(1, 480, 320)
    spectrum = torch.fft.rfft(frames * torch.hann_window(480, dtype=torch.float64), 512).abs()
    mels = torch.log(spectrum @ mel_matrix(257, 40, 16_000, 20, 4000).double() + 1e-6)
    place = torch.arange(40, dtype=torch.float64) + 0.5
    expected = torch.stack([(mels * torch.cos(math.pi * k * place / 40)).sum(-1) * 2 / 80**0.5 for k in range(10)], -1)
    found = MFCC()(waveforms)
    assert found.shape == (2, 1, 49, 10)
    assert (found[:, 0] - expected).abs().max() < 1e-3
    assert torch.allclose(MFCC()(waveforms * 0.01), found, atol=1e-3)
    assert MFCC()(torch.zeros(1, 16_000)).isfinite().all()


def test_mel_scales_are_those_of_the_libraries() -> None:
    """TensorFlow's linear_to_mel_weight_matrix and librosa's filters.mel, by their formulas."""
    triangles = mel_matrix(257, 40, 16_000, 20, 4000)
    assert triangles.shape == (257, 40)
    assert triangles[0].sum() == 0
    peaks = 16_000 / 2 / 256 * triangles.argmax(0)
    step = (1127 * math.log(1 + 4000 / 700) - 1127 * math.log(1 + 20 / 700)) / 41
    centre = 700 * (math.exp((1127 * math.log(1 + 20 / 700) + 30 * step) / 1127) - 1)
    assert abs(peaks[29] - centre) < 16_000 / 512
    slaney = mel_matrix(513, 128, 16_000, 0, 8000, "slaney")
    # Triangles of area 1 in Hz, as far as bins of 15.6 Hz resolve them.
    assert torch.allclose(slaney[:, 60:].sum(0) * 16_000 / 1024, torch.ones(68), atol=0.05)
    with pytest.raises(ValueError, match="high_hz=9000"):
        mel_matrix(257, 40, 16_000, 20, 9000)


def test_log_mel_finds_a_tone_in_its_band() -> None:
    time = torch.arange(16_000) / 16_000
    found = log_mel(torch.sin(2 * math.pi * 1000 * time))
    assert found.shape == (32, 128)
    bands = mel_matrix(513, 128, 16_000, 0, 8000, "slaney")
    assert found[10].argmax() == bands[64].argmax()
    assert found[10].max() - found[10].median() > 60


def test_the_features_in_the_network_are_those_outside() -> None:
    waveforms = torch.from_numpy(noise(16_000)).float()[None] / 32768
    network = WaveformDSCNN(8, 3).eval()
    assert torch.equal(network(waveforms), network.classifier(MFCC()(waveforms)))
    assert not any(name.startswith("features") for name in network.state_dict())


def words(folder: Path, speakers: int = 30) -> Path:
    for word in ("go", "no", "tree"):
        for number in range(speakers):
            write(folder / word / f"{number:08x}_nohash_0.wav", sound_bytes(noise(8000, number)))
    write(folder / "_background_noise_" / "hum.wav", sound_bytes(noise(20_000, 1)))
    return folder


def test_speakers_are_in_one_part_and_classes_are_in_order(tmp_path: Path) -> None:
    found = find_clips(words(tmp_path), ["go", "no"], seed=0)
    speakers = {part: {clip.path.stem[:8] for clip in clips if clip.path} for part, clips in found.items()}
    assert not speakers["train"] & speakers["validation"]
    assert not (speakers["train"] | speakers["validation"]) & speakers["test"]
    assert [clip.path.parent.name for clip in found["train"] if clip.label == 1 and clip.path][:1] == ["no"]
    assert {clip.label for clip in found["train"]} == {0, 1, 2, 3}
    assert all(clip.path is None for clip in found["train"] if clip.label == 2)
    assert all(clip.path and clip.path.parent.name == "tree" for clip in found["train"] if clip.label == 3)
    assert find_clips(tmp_path, ["go", "no"], seed=0) == found


def test_lists_decide_where_there_are_some(tmp_path: Path) -> None:
    words(tmp_path)
    (tmp_path / "validation_list.txt").write_text("go/00000003_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/00000004_nohash_0.wav\ngo/00000004_nohash_0.wav\n")
    found = find_clips(tmp_path, ["go", "no"], seed=0)
    named = {
        part: [clip.path.stem[:8] for clip in clips if clip.path and clip.label < 2] for part, clips in found.items()
    }
    assert named["validation"] == ["00000003"]
    assert named["test"] == ["00000004"] * 2
    assert len(named["train"]) == 57


def test_words_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no folder 'stop'; it needs a folder of WAV files for each word"):
        find_clips(words(tmp_path, 1), ["go", "stop"], seed=0)
    with pytest.raises(FileNotFoundError, match="has no clip of go for"):
        find_clips(tmp_path, ["go"], seed=0)
    with pytest.raises(ValueError, match="each once"):
        SpeechCommandsDataModule(str(tmp_path), words=["go", "go"])
    with pytest.raises(ValueError, match="is no folder"):
        SpeechCommandsDataModule(str(tmp_path / "nothing"))


def test_only_training_clips_are_mixed_with_noise(tmp_path: Path) -> None:
    data = SpeechCommandsDataModule(str(words(tmp_path)), words=["go", "no"], batch_size=8)
    data.setup("fit")
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader(), "test": data.test_dataloader()}
    for part, loader in loaders.items():
        clips: ClipFiles = loader.dataset  # type: ignore[assignment]
        same = [torch.equal(clips[index][0], clips[index][0]) for index in range(len(clips))]
        assert all(same) == (part != "train")
    waveforms, labels = next(iter(loaders["validation"]))
    assert waveforms.shape == (len(labels), 16_000)
    assert waveforms[0, 8000:].abs().max() == 0
    assert data.on_after_batch_transfer((waveforms, labels), 0)[0].shape == (len(labels), 1, 49, 10)
    data.features = False
    assert data.on_after_batch_transfer((waveforms, labels), 0)[0] is waveforms


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            content = sound_bytes(noise(100)) if name.endswith(".wav") else b"go/a_nohash_0.wav\n"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./go/linked.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_only_words_and_lists_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["./go/a_nohash_0.wav", "./_background_noise_/hum.wav", "./testing_list.txt", "./README.md"]
    hostile = ["../escaped.wav", "/escaped/escaped.wav", "./go/../../escaped.wav", "./go/deep/er.wav"]
    made = archive(tmp_path / "words.tar.gz", [*names, *hostile])
    (tmp_path / "words.unpacking" / "old").mkdir(parents=True)  # of a run that was killed
    unpack(made, tmp_path / "words")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"words/go/a_nohash_0.wav", "words/_background_noise_/hum.wav", "words/testing_list.txt"}
    monkeypatch.setattr(speech_commands, "_MOST_MEMBER_BYTES", 50)
    with pytest.raises(ValueError, match="allowed"):
        unpack(archive(tmp_path / "large.tar.gz", names), tmp_path / "large")


def test_windows_lie_in_one_clip() -> None:
    first, second = torch.arange(14.0).reshape(7, 2), torch.arange(100.0, 110.0).reshape(5, 2)
    windows = Windows([first, second])
    expected = torch.cat([windows_of(first), windows_of(second)])
    assert expected.shape == (4, 10)
    assert torch.equal(expected[0], torch.arange(10.0))
    assert torch.equal(windows.__getitems__(range(4))[0], expected)
    assert torch.equal(windows[3][0], expected[3])


def test_anomalies_are_told_from_normal_sounds(tmp_path: Path) -> None:
    time = np.arange(16_000) / 16_000
    for number in range(4):
        hiss = noise(16_000, number)
        normal = hiss + (8000 * np.sin(2 * math.pi * 500 * time)).astype(np.int16)
        anomaly = hiss + (8000 * np.sin(2 * math.pi * 3000 * time)).astype(np.int16)
        write(tmp_path / "train" / f"normal_id_01_{number}.wav", sound_bytes(normal))
        write(tmp_path / "test" / f"normal_id_01_{number}.wav", sound_bytes(normal[::-1]))
        write(tmp_path / "test" / f"anomaly_id_01_{number}.wav", sound_bytes(anomaly))
    data = MachineSoundsDataModule(str(tmp_path), batch_size=16)
    torch.manual_seed(0)
    task = AnomalyDetector(nn.Sequential(nn.Linear(640, 4), nn.Linear(4, 640)), 1e-2)
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    assert trainer.test(task, data, verbose=False)[0]["test_auc"] == 1.0
    scores = torch.stack(trainer.predict(task, data))
    assert scores[:4].max() < scores[4:].min()


def test_recordings_that_are_missing_or_too_short_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds 0 files normal_\*\.wav; 2 or more are needed"):
        MachineSoundsDataModule(str(tmp_path)).setup("fit")
    for number in range(2):
        write(tmp_path / "train" / f"normal_{number}.wav", sound_bytes(noise(1000)))
    with pytest.raises(ValueError, match="is too short: 2 frames"):
        MachineSoundsDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="validation_share=1"):
        MachineSoundsDataModule(str(tmp_path), validation_share=1)
