//! What linearising does to the graph.

use depthshrinker::graph::{Activation, BlockId, BlockState, Graph, Op, Span};
use depthshrinker::model::Model;
use depthshrinker::shape::{Padding, Shape};
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, drop_linear_activations, linearise, prepare_finetune};

use crate::networks::{inverted_residual, tiny_mobilenet};
use crate::reference::{Reference, noise, random_model, relative_error};

const REORDER: Linearise = Linearise { final_activation: true, padding: PaddingMode::Reorder };
const BORDER_BIAS: Linearise = Linearise { final_activation: true, padding: PaddingMode::BorderBias };

fn names(graph: &Graph, block: usize) -> Vec<&str> {
    graph.nodes[graph.blocks[block].nodes].iter().map(|n| n.name.as_str()).collect()
}

/// Frees blocks 0 (depthwise-separable), 1 (stride 2), 2 (residual) and 9.
fn freed() -> Vec<bool> {
    (0..17).map(|b| ![0, 1, 2, 9].contains(&b)).collect()
}

#[test]
fn activations_go_and_a_final_one_comes() {
    let model = random_model(tiny_mobilenet(), 1);
    let linear = linearise(&model, &freed(), &BORDER_BIAS).unwrap();
    assert_eq!(linear.graph.blocks.len(), 17);
    assert_eq!(linear.graph.kept(), freed());
    let block = |names: &[&str]| names.iter().map(|n| format!("blocks.{n}")).collect::<Vec<_>>();
    assert_eq!(names(&linear.graph, 0), block(&["0.0.conv_dw", "0.0.bn1", "0.0.conv_pw", "0.0.bn2", "0.0.add"]));
    let strided = ["1.0.conv_pw", "1.0.bn1", "1.0.conv_dw", "1.0.bn2", "1.0.conv_pwl", "1.0.bn3", "1.0.bn3.act"];
    assert_eq!(names(&linear.graph, 1), block(&strided));
    assert_eq!(names(&linear.graph, 2).last(), Some(&"blocks.1.1.add.act"));
    let last = &linear.graph.nodes[linear.graph.blocks[2].output()];
    assert_eq!(last.op, Op::Activation(Activation { limit: Some(6.0), site: None, slope: 0.0 }));
    assert_eq!(names(&linear.graph, 3), names(&model.graph, 3));
    for b in 0..17 {
        assert_eq!(
            linear.graph.state(BlockId::new(b)),
            if freed()[b] { BlockState::Active } else { BlockState::Linear }
        );
    }
    assert_eq!(linear.weights, model.weights);

    let plain = linearise(&model, &freed(), &Linearise { final_activation: false, ..BORDER_BIAS }).unwrap();
    assert_eq!(names(&plain.graph, 2).last(), Some(&"blocks.1.1.add"));
    let Merged { model: merged, .. } = merge(&linear, &MergeOptions { padding: PaddingMode::BorderBias }).unwrap();
    assert_eq!(names(&merged.graph, 0), ["blocks.0.0.conv"]);
    assert_eq!(names(&merged.graph, 2), ["blocks.1.1.conv", "blocks.1.1.add.act"]);
}

#[test]
fn reordering_pads_the_expansion_only_as_far_as_is_read() {
    for (size, stride, expected) in [
        ((8, 8), 1, Padding::all(1)),
        ((8, 8), 2, Padding { top: 1, left: 1, bottom: 0, right: 0 }),
        ((7, 8), 2, Padding { top: 1, left: 1, bottom: 1, right: 0 }),
    ] {
        let graph = inverted_residual(Shape::new(size.0, size.1, 4), 6, 4, 3, stride, Padding::all(1));
        let linear = linearise(&random_model(graph, 1), &[false], &REORDER).unwrap();
        let pads: Vec<Padding> = linear
            .graph
            .nodes
            .iter()
            .filter_map(|n| match n.op {
                Op::Conv(conv) => Some(conv.window.pad),
                _ => None,
            })
            .collect();
        assert_eq!(pads, [expected, Padding::ZERO, Padding::ZERO], "{size:?} stride {stride}");
        assert_eq!(linear.weight("expand.weight").shape, [6, 1, 1, 4]);
    }
}

/// Inside, reordering changes nothing; on the border it does, and the sizes stay.
#[test]
fn reordering_changes_only_the_border() {
    let graph = inverted_residual(Shape::new(7, 7, 4), 9, 4, 3, 1, Padding::all(1));
    let model = random_model(graph, 3);
    let image = noise(model.graph.input_shape().len(), 4);
    let output = |options| {
        let linear = linearise(&model, &[false], &Linearise { final_activation: false, ..options }).unwrap();
        Reference::new(&linear).values(&image).swap_remove(linear.graph.blocks[0].output().index())
    };
    let (zero_padded, reordered) = (output(BORDER_BIAS), output(REORDER));
    let differ = zero_padded.chunks(4).zip(reordered.chunks(4)).filter(|(a, b)| relative_error(a, b) > 1e-9).count();
    assert_eq!(differ, 24);
}

/// Finetuning with a moving slope ends in the linear network: same graph, and at slope 1 the same function.
#[test]
fn preparing_and_dropping_is_linearising() {
    let model = random_model(tiny_mobilenet(), 1);
    let removed: Vec<bool> = freed().iter().map(|k| !k).collect();
    for options in [REORDER, BORDER_BIAS] {
        let prepared = prepare_finetune(&model, &freed(), &options).unwrap();
        assert!(BlockId::all(17).all(|b| prepared.graph.state(b) == BlockState::Active));
        assert_eq!(prepare_finetune(&prepared, &freed(), &options).unwrap(), prepared);
        let linear = linearise(&model, &freed(), &options).unwrap();
        assert_eq!(drop_linear_activations(&prepared, &removed).unwrap(), linear);

        let image = noise(model.graph.input_shape().len(), 4);
        let mut moving = Reference::new(&prepared);
        let logits = |network: &Reference| network.values(&image).pop().unwrap();
        let linear = logits(&Reference::new(&linear));
        assert!(relative_error(&linear, &logits(&moving)) > 1e-3, "slope 0 keeps the activations");
        moving.slopes = removed.iter().map(|&r| f64::from(u8::from(r))).chain([0.0]).collect();
        assert_eq!(relative_error(&linear, &logits(&moving)), 0.0);
    }
}

#[test]
fn padding_modes_have_names() {
    for mode in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        assert_eq!(mode.to_string().parse::<PaddingMode>().unwrap(), mode);
        assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
    }
    assert!("middle".parse::<PaddingMode>().unwrap_err().to_string().contains("reorder or border-bias"));
    assert_eq!(Span::IDENTITY.join(Span { stride: [2, 1], ..Span::IDENTITY }), None);
}

#[test]
fn a_model_without_linear_blocks_merges_to_itself() {
    let model: Model = random_model(tiny_mobilenet(), 1);
    let merged = merge(&model, &MergeOptions { padding: PaddingMode::Reorder }).unwrap();
    assert_eq!(merged, Merged::unchanged(model));
}
