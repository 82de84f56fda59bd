"""The files in jobs/ for other schedulers; tests/runs/test_slurm.py runs the SLURM one."""

import pytest
import yaml
from conftest import ROOT, parse_train_args
from kubeflow_trainer_api.models import IoK8sApiCoreV1PersistentVolumeClaim, TrainerV1alpha1TrainJob

KUBERNETES = list(yaml.safe_load_all((ROOT / "jobs" / "kubernetes.yaml").read_text()))
CLAIM, JOB = KUBERNETES


@pytest.mark.parametrize(
    ("given", "model"), [(CLAIM, IoK8sApiCoreV1PersistentVolumeClaim), (JOB, TrainerV1alpha1TrainJob)]
)
def test_kubernetes_knows_every_field(given, model):
    """Kubeflow's models drop fields that they do not know."""
    assert model.from_dict(given).to_dict() == given


def test_the_pods_mount_the_claim():
    pod = JOB["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    pod = pod["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["results"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]


def test_train_py_knows_the_job_s_flags():
    trainer = JOB["spec"]["trainer"]
    assert trainer["command"][-1] == "train.py"
    parse_train_args([*trainer["args"], "--use_cpu", "true", "--deepspeed", "ds_configs/cpu.json"])
