//! The library's own proof, through the engine that runs the networks.

use depthshrinker::shrink::merge::{MergeOptions, TOLERANCE, merge, verify, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};

use crate::networks::tiny_mobilenet;
use crate::reference::{Reference, noise, random_model};

#[test]
fn merged_networks_pass_and_wrong_ones_do_not() {
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let model = random_model(tiny_mobilenet(), 1);
        let kept: Vec<bool> = (0..17).map(|b| b % 2 == 0).collect();
        let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
        let (mut merged, _) = merge(&linear, &MergeOptions { padding }).unwrap();
        let error = verify_random(&linear, &merged, 19, 5).unwrap();
        assert!(error.max_rel_error <= TOLERANCE / 10.0, "{error:?}");
        assert_eq!(error, verify_random(&linear, &merged, 19, 5).unwrap());

        let bias = merged.weights.iter_mut().find(|(name, _)| name.contains(".conv.bias")).unwrap().1;
        bias.data.iter_mut().for_each(|b| *b += 1.0);
        assert!(verify_random(&linear, &merged, 19, 5).unwrap().max_rel_error > TOLERANCE);
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
    let (mut merged, _) = merge(&linear, &MergeOptions { padding }).unwrap();
    let error = verify_random(&linear, &merged, 3, 5).unwrap();
    let worst = error.worst_block.unwrap();
    assert!([4, 9].contains(&worst.block) && worst.max_rel_error > 0.0 && worst.max_rel_error <= TOLERANCE / 10.0);
    error.check(&merged.graph).unwrap();

    let name = merged.graph.blocks[9].name.clone();
    let wrong = merged.weights.iter_mut().find(|(key, _)| key.starts_with(&format!("{name}.conv.bias"))).unwrap().1;
    wrong.data.iter_mut().for_each(|b| *b += 1.0);
    let error = verify_random(&linear, &merged, 3, 5).unwrap();
    assert_eq!((error.max_abs_error, error.worst_block.unwrap().block), (0.0, 9));
    let text = error.check(&merged.graph).unwrap_err().to_string();
    assert!(text.contains(&format!("the output of block {name}")), "{text}");
    // Of two verifications the larger errors count.
    let other = verify_random(&linear, &linear, 3, 5).unwrap();
    assert_eq!((other.worst_block, other.worse(error), error.worse(other)), (None, error, error));
}

/// The engine, which folds batch-norm for inference, agrees with the seven loops on a merged network.
#[test]
fn the_error_is_measured_on_the_logits() {
    let model = random_model(tiny_mobilenet(), 2);
    let linear = linearise(&model, &[false; 17], &Linearise { final_activation: true, padding: PaddingMode::Reorder });
    let linear = linear.unwrap();
    let image = noise(model.graph.input_shape().len(), 3);
    let narrow: Vec<f32> = image.iter().map(|&v| v as f32).collect();
    let wide: Vec<f64> = narrow.iter().map(|&v| f64::from(v)).collect();
    let logits = |m| Reference::new(m).values(&wide).pop().unwrap();
    let (a, b) = (logits(&model), logits(&linear));
    let expected = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let error = verify(&model, &linear, &narrow, 1).unwrap();
    assert!((error.max_abs_error - expected).abs() < 1e-4 * expected, "{} against {expected}", error.max_abs_error);
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let model = random_model(tiny_mobilenet(), 2);
    let image = model.graph.input_shape().len();
    assert!(verify(&model, &model, &vec![0.0; image], 2).is_err());
    assert!(verify(&model, &model, &[], 0).is_err());
    assert!(verify(&model, &model, &vec![f32::NAN; image], 1).is_err());
    assert_eq!(verify(&model, &model, &vec![0.5; image], 1).unwrap().max_abs_error, 0.0);
}
