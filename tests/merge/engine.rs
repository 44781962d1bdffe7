//! The library's own proof, through the engine that runs the networks.

use depthshrinker::shrink::merge::{MergeOptions, Merged, merge, verify, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};

use crate::networks::tiny_mobilenet;
use crate::reference::random_model;

#[test]
fn merged_networks_pass_and_wrong_ones_do_not() {
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let model = random_model(tiny_mobilenet(), 1);
        let kept: Vec<bool> = (0..17).map(|b| b % 2 == 0).collect();
        let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
        let mut merged = merge(&linear, &MergeOptions { padding }).unwrap();
        let error = verify_random(&linear, &merged, 19, 5).unwrap();
        error.check(&merged).unwrap();
        assert!(error.max_rel_error <= 1e-5, "{error:?}");
        assert_eq!(error, verify_random(&linear, &merged, 19, 5).unwrap());

        let bias = merged.model.weights.iter_mut().find(|(name, _)| name.contains(".conv.bias")).unwrap().1;
        bias.data.iter_mut().for_each(|b| *b += 1.0);
        let error = verify_random(&linear, &merged, 19, 5).unwrap();
        assert!(error.max_rel_error > 1e-4 && error.check(&merged).is_err(), "{error:?}");
    }
}

/// Logits may agree where features do not: here because the classifier reads nothing.
#[test]
fn features_behind_merged_blocks_are_compared_too() {
    let padding = PaddingMode::BorderBias;
    let mut model = random_model(tiny_mobilenet(), 1);
    model.weights.get_mut("classifier.weight").unwrap().data.fill(0.0);
    let kept: Vec<bool> = (0..17).map(|b| ![4, 9].contains(&b)).collect();
    let linear = linearise(&model, &kept, &Linearise { final_activation: false, padding }).unwrap();
    let mut merged = merge(&linear, &MergeOptions { padding }).unwrap();
    let error = verify_random(&linear, &merged, 3, 5).unwrap();
    let worst = error.worst_segment.unwrap();
    assert!(worst.segment < 2 && worst.max_rel_error > 0.0 && worst.of_bound < 1.0, "{worst:?}");
    error.check(&merged).unwrap();

    let name = merged.segments[1].name.clone();
    let bias = format!("{name}.conv.bias");
    let wrong = merged.model.weights.iter_mut().find(|(key, _)| key.starts_with(&bias)).unwrap().1;
    wrong.data.iter_mut().for_each(|b| *b += 1.0);
    let error = verify_random(&linear, &merged, 3, 5).unwrap();
    assert_eq!((error.max_abs_error, error.worst_segment.unwrap().segment), (0.0, 1));
    let text = error.check(&merged).unwrap_err().to_string();
    assert!(text.contains(&format!("merged from {name} is wrong")), "{text}");
    // Of two verifications the larger errors count.
    let other = verify_random(&linear, &Merged::unchanged(linear.clone()), 3, 5).unwrap();
    assert_eq!((other.worst_segment, other.worse(error), error.worse(other)), (None, error, error));
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let model = random_model(tiny_mobilenet(), 2);
    let (image, same) = (model.graph.input_shape().len(), Merged::unchanged(model.clone()));
    assert!(verify(&model, &same, &vec![0.0; image], 2).is_err());
    assert!(verify(&model, &same, &[], 0).is_err());
    assert!(verify(&model, &same, &vec![f32::NAN; image], 1).is_err());
    assert_eq!(verify(&model, &same, &vec![0.5; image], 1).unwrap().max_abs_error, 0.0);
}
