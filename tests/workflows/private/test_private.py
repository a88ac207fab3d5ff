"""The private parts of Ray and MLflow that are used exist, with the signatures that are called: a release may change them."""

import inspect

import pytest

from workflows.private import mlflow as of_mlflow


def parameters(call):
    return list(inspect.signature(call).parameters)


def test_of_ray_s_core():
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import find_gcs_addresses, find_node_ids
    from ray._private.state import GlobalState, actors
    from ray._private.worker import global_worker
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.job_submission import JobSubmissionClient
    from ray.tune.execution import class_cache

    assert parameters(find_gcs_addresses) == parameters(find_node_ids) == []
    assert "warn_if_disabled" in parameters(maybe_enable_token_auth_if_token_available)
    assert parameters(init_grpc_channel)[0] == "address"
    assert parameters(GlobalState.get_max_resources_from_cluster_config) == ["self"]
    assert callable(actors)
    assert "core_worker" in inspect.getsource(type(global_worker))
    assert parameters(prepare_config)[0] == parameters(validate_config)[0] == "config"
    assert parameters(JobSubmissionClient._do_request)[:3] == ["self", "method", "endpoint"]
    assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set)


def test_of_ray_train():
    from workflows.private import ray_train

    for base, name in (
        (ray_train.TorchTrainer, "_create_default_callbacks"),
        (ray_train.TorchTrainer, "_initialize_and_run_controller"),
        (ray_train.FixedScalingPolicy, "after_controller_start"),
        (ray_train.FixedScalingPolicy, "_maybe_send_resource_request"),
        (ray_train.WorkerGroup, "_get_worker_runtime_env"),
        (ray_train.TrainController, "worker_group_cls"),
        (ray_train.TrainController, "abort"),
        (ray_train.WorkerGroupCallback, "before_worker_group_shutdown"),
    ):
        assert hasattr(base, name), f"{base.__name__}.{name}"
    own = {ray_train.TrainController.__name__, ray_train.LocalTrainController.__name__}
    assert own == set(ray_train.CONTROLLERS)
    assert "scaling_policy" in inspect.getsource(ray_train.TorchTrainer.fit)


def test_of_mlflow(tmp_path):
    """A run and a model, deleted and removed, in a store of its own."""
    from mlflow.entities import LoggedModelStatus
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = SqlAlchemyStore(uri, str(tmp_path / "artifacts")).create_experiment("one")
    store = of_mlflow.store_at(uri)
    run = store.create_run(experiment, "me", 0, [], "run").info.run_id
    model = store.create_logged_model(experiment, name="model", source_run_id=run, tags=[], params=[]).model_id
    store.finalize_logged_model(model, LoggedModelStatus.READY)
    assert of_mlflow.deleted_runs(store, 0) == of_mlflow.deleted_models(store, 0) == []
    store.delete_run(run)
    store.delete_logged_model(model)
    assert of_mlflow.deleted_runs(store, 0) == [run]
    assert of_mlflow.deleted_models(store, 0) == [model]
    of_mlflow.remove_model(store, model)
    of_mlflow.remove_run(store, run)
    assert of_mlflow.deleted_runs(store, 0) == of_mlflow.deleted_models(store, 0) == []
    with pytest.raises(Exception, match="not found"):
        store.get_run(run)
