"""Curvature in the training loops of Lightning and of HuggingFace's transformers."""

import csv
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as lightning
    import transformers

from lossgeometry import CurvatureHistory, Hessian, eigsh
from lossgeometry.callbacks import huggingface
from lossgeometry.callbacks.lightning import CurvatureCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the two packages


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=generator)
    return x, x.argmax(1).clamp(max=2)


def lightning_training(folder, callbacks, epochs=2, checkpoint=None, accumulate=1):
    torch.manual_seed(1)
    model = Classifier()
    data = torch.utils.data.TensorDataset(*batches())
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=lightning.loggers.CSVLogger(folder),
    )
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    trainer.fit(model, loader, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, trainer


def test_lightning(tmp_path):
    path = tmp_path / "rows.h5"
    alone, _ = lightning_training(tmp_path, [])
    callback = CurvatureCallback(F.cross_entropy, batches(), every=4, path=path, precondition=True)
    watched, trainer = lightning_training(tmp_path, [callback])
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    history = callback.tracker.result()
    assert history.steps.tolist() == [4, 8, 12, 16]
    assert history.threshold == pytest.approx([38.0] * 4)
    found = eigsh(
        Hessian(watched.train(), F.cross_entropy, batches()), k=1, which="LA", tol=1e-4
    ).eigenvalues
    assert abs(history.eigenvalues[-1, 0] - float(found)) <= history.errors[-1, 0]
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        logged = [float(row["eigenvalue_1"]) for row in csv.DictReader(file) if row["eigenvalue_1"]]
    assert logged == pytest.approx(history.eigenvalues[:, 0])
    # What goes on at a checkpoint goes on with its rows, and steps are the optimizer's.
    more = CurvatureCallback(F.cross_entropy, batches(), every=4, path=path, precondition=True)
    lightning_training(tmp_path, [more], epochs=3, checkpoint=tmp_path / "last.ckpt")
    assert CurvatureHistory.load(path).steps.tolist() == [4, 8, 12, 16, 20, 24]
    fewer = CurvatureCallback(F.cross_entropy, batches(), every=2)
    lightning_training(tmp_path, [fewer], accumulate=4)
    assert fewer.tracker.result().steps.tolist() == [2, 4]


class Examples(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(20, (32, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": (self.ids[i, 0] > 9).long()}


def transformers_training(folder, callbacks):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Examples(), callbacks=callbacks
    )
    trainer.train()
    return model, trainer


def test_transformers(tmp_path):
    examples = Examples()
    probe = {"input_ids": examples.ids, "labels": (examples.ids[:, 0] > 9).long()}
    rows = []
    alone, _ = transformers_training(tmp_path, [])
    callback = huggingface.CurvatureCallback(None, probe, every=2, log=rows.append)
    watched, _ = transformers_training(tmp_path, [callback])
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    history = callback.tracker.result()
    assert history.steps.tolist() == [2, 4, 6, 8]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    found = eigsh(Hessian(watched.train(), None, probe), k=1, which="LA", tol=1e-4).eigenvalues
    assert abs(history.eigenvalues[-1, 0] - float(found)) <= history.errors[-1, 0]


def test_transformers_with_its_optimizer(tmp_path):
    examples = Examples()
    probe = {"input_ids": examples.ids, "labels": (examples.ids[:, 0] > 9).long()}
    callback = huggingface.CurvatureCallback(None, probe, every=4, precondition=True)
    transformers_training(tmp_path, [callback])
    history = callback.tracker.result()
    assert np.isfinite(history.eigenvalues).all()
    # The schedule has halved the step by the middle, and there is none after the last.
    assert history.threshold.tolist() == [pytest.approx(38 / 0.005), np.inf]
