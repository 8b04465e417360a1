"""What all tests share: the same random numbers in every run, and one pool of workers, started by the first need."""

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import threadpoolctl

from pipeline.config.cluster import Cluster
from pipeline.workers import client
from pipeline.workers import pool as cluster

# What tests compute themselves is compared to the bit with what workers computed: with the same threads and rounding.
os.environ |= cluster.ARITHMETIC
threadpoolctl.threadpool_limits(1)  # of what is there before the variables: zarr's plugin of pytest imports numpy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs the whole workflow, file by file the longest, comes first: what is short fills the processes' ends."""
    items.sort(key=lambda item: item.path.parent.name not in ("chaos", "real", "workflow"))
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, set | frozenset) and len(value) > 1 for value in values):
            raise pytest.UsageError(f"{item.nodeid}: a set has another order in every process: give a sorted list")


NAMES_OF_OURS = ("pipeline", "kernels", "torch", "yaml", "numpy", "zarr", "dask", "distributed")
SLOW = (
    "tests/chaos/",
    "tests/real/",
    # Each case runs stages anew, or starts Snakemake several times.
    "tests/workflow/test_adding_a_stage.py",
    "tests/workflow/test_one_results_folder.py",
    "tests/workflow/test_privacy.py",
    "tests/workflow/test_profiles.py",
    "tests/workflow/test_shared_layers.py",
    "tests/workflow/test_slurm.py",
    "tests/pipeline/upkeep/test_incremental.py",
    "tests/pipeline/stages/test_compare.py",
    "tests/pipeline/stages/test_data_fraction.py",
    # Processes that are killed, sizes and times, a browser.
    "tests/pipeline/run/test_benches.py",
    "tests/pipeline/run/test_scale.py",
    "tests/pipeline/stages/test_attribute_browser.py",
    # The stage with families of methods, of which test_attribute.py has one each.
    "tests/pipeline/stages/test_attribute_differences.py",
    "tests/pipeline/stages/test_attribute_lrp.py",
    "tests/pipeline/stages/test_attribute_segments.py",
    "tests/pipeline/stages/test_audit_laws.py",
    "tests/pipeline/stages/test_report_browser.py",
    "tests/pipeline/stages/test_intervene.py",
    "tests/pipeline/stages/test_visualize.py",
    "tests/pipeline/stages/test_attack.py",
    "tests/pipeline/workers/test_pool.py",
    "tests/pipeline/workers/test_processes.py",
    "tests/pipeline/workers/test_threads.py",
    # Oracles of other libraries, which take seconds to import.
    "tests/pipeline/networks/test_attribution_oracles.py",
    "tests/pipeline/networks/test_library_networks.py",
    "tests/pipeline/networks/test_published.py",
    "tests/pipeline/networks/test_zhang2017.py",
    "tests/pipeline/run/test_configs.py",
    "tests/pipeline/plan/test_golden_plans.py",
    # A stage run several times: with one worker and two, cut off, from other images, or of many layers.
    "tests/pipeline/data/test_max_images.py::test_a_bound_that_is_lifted_and_set_again",
    "tests/pipeline/data/test_published_layouts.py::test_imagenet_from_a_config_to_the_store",
    "tests/pipeline/networks/test_layer_id.py::test_ids_are_the_same_in_another_process",
    "tests/pipeline/networks/test_segmenters.py::test_another_source_and_another_version_of_it",
    "tests/pipeline/networks/test_segmenters.py::test_label_maps_are_those_of_the_library[mask2former]",
    "tests/pipeline/networks/test_segmenters.py::test_scores_that_are_not_finite",
    "tests/pipeline/networks/test_training.py::test_a_killed_process_leaves_no_trace",
    "tests/pipeline/run/test_forecast.py::test_what_was_foretold_is_what_was_written",
    "tests/pipeline/stages/test_ablate.py::test_a_class_without_images_is_nan_with_a_note",
    "tests/pipeline/stages/test_ablate.py::test_losses_are_those_of_whole_forwards[tiny-shuffled]",
    "tests/pipeline/stages/test_ablate.py::test_losses_are_those_of_whole_forwards[tiny-zero]",
    "tests/pipeline/stages/test_ablate.py::test_losses_are_those_of_whole_forwards[vit-zero]",
    "tests/pipeline/stages/test_ablate.py::test_only_what_changed_is_made_again",
    "tests/pipeline/stages/test_ablate.py::test_stored_shards_and_computed_ones_give_the_same",
    "tests/pipeline/stages/test_ablate.py::test_the_same_bits_for_any_workers_and_after_a_cut",
    "tests/pipeline/stages/test_ablate.py::test_what_is_seen_before_any_work",
    "tests/pipeline/stages/test_attribute.py::test_an_image_explained_alone_has_the_bits_that_it_has_among_others",
    "tests/pipeline/stages/test_attribute.py::test_baselines_are_images",
    "tests/pipeline/stages/test_attribute.py::test_two_workers_and_an_interrupted_run_give_the_same_bytes",
    "tests/pipeline/stages/test_attribute.py::test_what_a_change_computes_again",
    "tests/pipeline/stages/test_attribute.py::test_what_a_network_does_not_have_is_refused_before_any_work",
    "tests/pipeline/stages/test_attribute.py::test_targets",
    "tests/pipeline/stages/test_attribute_page.py::test_beside_the_untrained_network",
    "tests/pipeline/stages/test_attribute_page.py::test_right_or_wrong_is_said_only_where_it_is_known",
    "tests/pipeline/stages/test_calibrate.py::test_any_number_of_workers_gives_the_same_bytes",
    "tests/pipeline/stages/test_calibrate_plain_files.py::test_the_page_shows_the_numbers",
    "tests/pipeline/stages/test_dissect.py::test_another_source_of_concepts_is_counted_beside_the_first",
    "tests/pipeline/stages/test_not_dissected.py",
    "tests/pipeline/stages/test_probes.py::test_controls_pooled_layers_and_a_split_that_chooses",
    "tests/pipeline/stages/test_probes.py::test_other_probes_cost_no_forward",
    "tests/pipeline/stages/test_probes.py::test_the_same_bits_for_any_workers_and_after_a_cut",
    "tests/pipeline/stages/test_report.py::test_odd_results_work[no cards asked for]",
    "tests/pipeline/stages/test_report.py::test_odd_results_work[no controls]",
    "tests/pipeline/stages/test_randomize.py::test_a_run_is_a_network_of_the_configuration",
    "tests/pipeline/stages/test_randomize.py::test_networks_are_inspected_before_any_work",
    "tests/pipeline/stages/test_randomize.py::test_the_same_bits_after_a_cut_and_for_any_workers",
    "tests/pipeline/stages/test_report.py::test_files_of_an_earlier_report_are_removed_and_other_files_kept",
    "tests/pipeline/stages/test_report.py::test_many_layers_and_long_names",
    "tests/pipeline/stages/test_report.py::test_same_results_same_bytes",
    "tests/pipeline/stages/test_report.py::test_several_data_sets_and_names_that_look_alike",
    "tests/pipeline/stages/test_sight.py::test_the_same_bits_for_any_workers_and_after_a_cut",
    "tests/pipeline/stages/test_similarity.py::test_the_same_bits_for_any_workers_and_after_a_cut",
    "tests/pipeline/stages/test_streamed.py::test_a_run_that_is_cut_short_goes_on_after_the_last_block",
    "tests/pipeline/stages/test_streamed.py::test_counted_in_torch_where_the_maps_are",
    "tests/pipeline/stages/test_streamed.py::test_damage_is_found_and_made_again",
    "tests/pipeline/stages/test_streamed.py::test_on_workers",
    "tests/pipeline/stages/test_streamed.py::test_other_settings_and_brackets_that_miss",
    "tests/pipeline/stages/test_streamed.py::test_pictures_are_those_of_stored_maps",
    "tests/pipeline/stages/test_streamed.py::test_stored_after_all_and_back",
    "tests/pipeline/stages/test_streamed.py::test_the_results_of_stored_layers_in_two_passes",
    "tests/pipeline/stages/test_streamed.py::test_units_that_are_counted_again_go_on_after_the_last_block",
    "tests/pipeline/stages/test_streamed.py::test_what_a_change_costs",
    "tests/pipeline/storage/test_object_storage.py",
    "tests/pipeline/workers/test_cluster_kinds.py",
    "tests/workflow/test_end_to_end.py::test_a_damaged_chunk_is_recomputed_alone",
    # The longest of what a shorter case, or a finished miniature, covers too.
    "tests/pipeline/data/test_listing.py::test_shares_are_stable_when_images_come_and_go",
    "tests/pipeline/networks/test_returned.py::test_transform_input_is_told_where_a_file_gives_the_weights",
    "tests/pipeline/networks/test_segmenters.py::test_label_maps_are_those_of_the_best_class",
    "tests/pipeline/run/test_forecast.py::test_the_memory_of_layers_that_are_not_stored_is_foretold",
    "tests/pipeline/run/test_forks.py::test_a_job_has_the_streams_the_environment_and_the_status",
    "tests/pipeline/run/test_forks.py::test_a_job_outlives_the_process_that_forked_it",
    "tests/pipeline/run/test_forks.py::test_a_job_that_fails_before_it_begins_is_done_by_the_client",
    "tests/pipeline/run/test_forks.py::test_a_killed_job_is_reported",
    "tests/pipeline/run/test_forks.py::test_a_signal_to_the_client_reaches_the_job[2]",
    "tests/pipeline/run/test_forks.py::test_the_socket_goes_with_the_process",
    "tests/pipeline/run/test_forks.py::test_what_jobs_share_has_one_thread",
    "tests/pipeline/run/test_forks.py::test_where_no_process_forks_jobs_each_is_its_own",
    "tests/pipeline/stages/test_ablate.py::test_losses_are_those_of_whole_forwards[vit-mean]",
    "tests/pipeline/stages/test_ablate.py::test_one_split_for_both_and_small_layers",
    "tests/pipeline/stages/test_attribute.py::test_the_plan_tells_forwards_bytes_and_memory",
    "tests/pipeline/stages/test_dissect.py::test_after_a_change_the_numbers_are_those_of_a_fresh_run",
    "tests/pipeline/stages/test_probes.py::test_a_changed_image_costs_its_shard",
    "tests/pipeline/stages/test_randomize.py::test_the_page_of_the_report",
    "tests/pipeline/stages/test_sight.py::test_the_page_of_the_report",
    "tests/pipeline/data/test_listing.py::test_known_images_keep_their_slots",
    "tests/pipeline/networks/test_segmenters.py::test_a_size_of_its_own_for_folders_without_label_maps",
    "tests/pipeline/stages/test_ablate.py::test_how_long_it_takes_is_said_before_and_images_are_proposed",
    "tests/pipeline/stages/test_attribute.py::test_a_baseline_of_another_size_or_turned_is_seen_before_any_work",
    "tests/pipeline/stages/test_attribute.py::test_classes_by_name_are_those_of_the_data_set_alone",
    "tests/pipeline/stages/test_dissect.py::test_the_same_settings_again_count_nothing",
    "tests/pipeline/stages/test_sight.py::test_a_changed_image_costs_its_minibatch_and_a_network_its_own",
    "tests/pipeline/stages/test_similarity.py::test_the_page_of_the_report",
    "tests/workflow/test_end_to_end.py::test_both_snakefiles_give_the_same_plan",
    "tests/workflow/test_refusals.py::test_wrong_networks",
    # Cases beside others of the same kind.
    "tests/pipeline/data/test_arrays.py::test_an_npz_from_a_config_to_the_store",
    "tests/pipeline/data/test_published_layouts.py::test_places365_from_a_config_to_the_store",
    "tests/kernels/dissection/test_published_arithmetic.py::test_with_exact_quantiles[pnas2020-pnas2020]",
    "tests/pipeline/networks/test_segmenters.py::test_a_segmenter_that_needs_more_memory_than_a_worker_has",
    "tests/pipeline/run/test_forecast.py::test_what_an_interrupted_run_left_counts",
    "tests/pipeline/stages/test_attribute.py::test_another_method_computes_that_alone_and_a_dropped_one_is_swept",
    "tests/pipeline/stages/test_attribute.py::test_a_name_may_become_another_method",
    "tests/pipeline/stages/test_attribute.py::test_fewer_images_leave_no_maps_of_the_others",
    "tests/pipeline/stages/test_attribute.py::test_an_experiment_that_no_configuration_names_is_swept",
    "tests/pipeline/stages/test_attribute_methods.py::test_batches_and_neighbours_change_nothing[attention_relevance]",
    "tests/pipeline/stages/test_attribute_methods.py::test_batches_and_neighbours_change_nothing[rollout]",
    "tests/pipeline/stages/test_attribute_methods.py::test_equal_functions_have_equal_integrated_gradients",
    "tests/pipeline/stages/test_attribute_page.py::test_means_are_the_same_whichever_task_ends_first",
    "tests/pipeline/stages/test_attribute_page.py::test_several_experiments_and_links_with_units",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_additive_methods_are_perfect_on_a_linear_network[deeplift]",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_additive_methods_are_perfect_on_a_linear_network[integrated_gradients]",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_additive_methods_are_perfect_on_a_linear_network[lrp]",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_every_control_is_there",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_figures_show_methods_before_controls_and_the_best_first[7.0]",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_integrated_gradients_from_the_empty_scene_add_up_to_the_score_of_all_objects",
    "tests/pipeline/stages/test_audit_counterfactual.py::test_pictures_are_seen_once_for_all_methods",
    "tests/pipeline/stages/test_calibrate.py::test_only_what_is_missing_is_made_again",
    "tests/pipeline/stages/test_dissect.py::test_against_the_definitions[0.1-0.0]",
    "tests/pipeline/stages/test_dissect.py::test_against_the_definitions[0.3-native-zeros-0.2]",
    "tests/pipeline/stages/test_dissect.py::test_against_the_definitions[cvpr2017]",
    "tests/pipeline/stages/test_dissect.py::test_another_least_iou_costs_no_pass_over_the_activations",
    "tests/pipeline/stages/test_dissect.py::test_the_same_counts_in_any_order_and_cut_into_any_runs",
    "tests/pipeline/stages/test_dissect.py::test_two_names_of_one_layer",
    "tests/pipeline/stages/test_extract.py::test_a_layer_without_its_maps_and_back",
    "tests/pipeline/stages/test_probes.py::test_classes_with_few_images",
    "tests/pipeline/stages/test_probes.py::test_the_page_of_the_report",
    "tests/pipeline/stages/test_report.py::test_odd_results_work[one unit]",
    "tests/pipeline/stages/test_report.py::test_odd_results_work[no detectors]",
    "tests/pipeline/stages/test_report.py::test_shows_the_counts_of_every_run",
    "tests/pipeline/stages/test_report_counts.py::test_shorten_keeps_both_ends",
    "tests/pipeline/stages/test_similarity.py::test_one_network_changes_and_the_other_is_not_asked",
    "tests/pipeline/networks/test_tail.py::test_units_and_sets_as_whole_forwards_give_them[mobilenet-features.17-False-torch.float64]",
    "tests/pipeline/networks/test_tail.py::test_units_and_sets_as_whole_forwards_give_them[resnet-layer3.0.conv2-False-torch.float32]",
    "tests/pipeline/networks/test_tail.py::test_units_and_sets_as_whole_forwards_give_them[resnet-layer4-False-torch.float32]",
    "tests/pipeline/networks/test_tail.py::test_units_and_sets_as_whole_forwards_give_them[resnet-layer4.0-False-torch.float32]",
    "tests/pipeline/networks/test_tail.py::test_units_and_sets_as_whole_forwards_give_them[resnet-layer4.1.bn2-False-torch.float32]",
    "tests/pipeline/stages/test_attribute.py::test_an_appended_image_computes_its_shard",
    "tests/pipeline/stages/test_attribute.py::test_controls_are_explained_if_they_are_named",
    "tests/pipeline/stages/test_attribute.py::test_maps_are_those_of_the_library[vit]",
    "tests/pipeline/stages/test_attribute.py::test_the_most_probable_classes_have_a_dimension",
    "tests/pipeline/stages/test_attribute_page.py::test_contributions_of_both_signs_are_columns_without_a_law",
    "tests/pipeline/stages/test_attribute_page.py::test_images_without_a_map_and_maps_without_values",
    "tests/pipeline/stages/test_attribute_page.py::test_several_classes_of_an_image",
    "tests/pipeline/stages/test_dissect.py::test_a_last_shard_of_one_image_has_no_part_in_the_permuted_control",
    "tests/pipeline/stages/test_dissect.py::test_a_network_that_shares_layers_shares_their_dissection",
    "tests/pipeline/stages/test_dissect.py::test_against_the_definitions[0.05-category-train]",
    "tests/pipeline/stages/test_dissect.py::test_against_the_definitions[pnas2020]",
    "tests/pipeline/stages/test_dissect.py::test_controls_of_fewer_images",
    "tests/pipeline/stages/test_dissect.py::test_hostile_names_of_concepts_and_images",
    "tests/pipeline/stages/test_similarity.py::test_cka_is_that_of_plain_forwards[how0]",
    "tests/pipeline/stages/test_similarity.py::test_cka_is_that_of_plain_forwards[how1]",
    "tests/pipeline/stages/test_similarity.py::test_smaller_last_minibatch_is_dropped_or_weighed",
)
"""What `make test-slow` runs, and `make test` does not."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.nodeid.startswith(SLOW):
        item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature experiment that the real Snakefile finished, with its configuration: made once for all processes.

    Tests hard-link its results, and copy what they damage.
    """
    from workflow_run import mini, snakemake

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            for name in NAMES_OF_OURS:  # files of a user's beside his configuration: no process imports them
                (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder was imported')")
            snakemake(folder, mini(workers=1))
            (folder / "made").touch()
    return folder


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Networks with initial weights are the same ones whichever tests run before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages run on one pool for the whole session, so that its worker imports torch and compiles kernels once."""
    with cluster.pool(Cluster(workers=1), tmp_path_factory.mktemp("pool")) as address:
        os.environ[client.ADDRESS] = str(address)
        yield
        del os.environ[client.ADDRESS]


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address file of a second pool, for tests that hold what two workers make against what one has made."""
    with cluster.pool(Cluster(workers=2), tmp_path_factory.mktemp("pool")) as address:
        yield str(address)
