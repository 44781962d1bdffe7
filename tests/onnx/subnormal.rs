//! Files hold no number that is subnormal in f32, and give the logits that networks have with zeros in their place; those of
//! f16 stay.

use depthshrinker::dtype::Dtype;
use depthshrinker::graph::{Op, ParamRole};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use half::f16;
use libtest_mimic::{Failed, Trial};

use crate::oracle::{Evaluator, evaluate};
use crate::{TOLERANCE_F16, TOLERANCE_F32, engine_logits, error_of, random_images, random_model};

/// What is subnormal in a network: some numbers of the parameters of a role.
struct Row {
    name: &'static str,
    is_meant: fn(ParamRole) -> bool,
    value: f32,
}

const ROWS: [Row; 5] = [
    Row { name: "beta", is_meant: |role| role == ParamRole::BnBias, value: 3e-41 },
    Row { name: "gamma", is_meant: |role| role == ParamRole::BnWeight, value: -1e-39 },
    Row { name: "weight", is_meant: |role| matches!(role, ParamRole::ConvWeight(_)), value: 2e-40 },
    Row { name: "classifier", is_meant: |role| role == ParamRole::LinearWeight, value: -5e-42 },
    // Normal, but its products with what batch-norms scale by are not.
    Row { name: "product", is_meant: |role| matches!(role, ParamRole::ConvWeight(_)), value: 1.2e-38 },
];

/// Three of four channels of each batch-norm dead but for a value; or three of four numbers of another parameter.
fn model(row: &Row, value: f32) -> Result<Model, Failed> {
    let graph = build("mobilenetv2-0.5", &NetworkOptions::new(Shape::new(64, 48, 3), 5))?;
    let mut model = random_model(graph, 1)?;
    for spec in model.graph.params()?.into_iter().filter(|spec| (row.is_meant)(spec.role)) {
        let name = |suffix: &str| format!("{}.{suffix}", model.graph.nodes[spec.node].name);
        let dead = |data: &mut [f32], to: f32| {
            data.iter_mut().enumerate().filter(|(i, _)| i % 4 != 0).for_each(|(_, v)| *v = to);
        };
        if matches!(model.graph.nodes[spec.node].op, Op::BatchNorm(_)) {
            for (suffix, to) in [("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1e-38)] {
                dead(&mut model.weights.get_mut(&name(suffix)).ok_or("a batch-norm")?.data, to);
            }
        }
        dead(&mut model.weights.get_mut(&spec.name).ok_or("a parameter")?.data, value);
    }
    Ok(model)
}

fn run(row: &Row) -> Result<(), Failed> {
    let (own, zeroed) = (model(row, row.value)?, model(row, 0.0)?);
    let padding = PaddingMode::BorderBias;
    let kept: Vec<bool> = (0..own.graph.blocks.len()).map(|block| block % 3 == 0).collect();
    let merged = |model: &Model| -> Result<Model, Failed> {
        let linear = linearise(model, &kept, &Linearise { final_activation: true, padding })?;
        Ok(merge(&linear, &MergeOptions { padding })?.model)
    };
    for (what, own, zeroed) in [("unmerged", &own, &zeroed), ("merged", &merged(&own)?, &merged(&zeroed)?)] {
        let images = random_images(own, 3);
        let engine = engine_logits(own, &images)?;
        // ONNX Runtime on the network with zeros is the oracle: what is subnormal is too small to be seen in logits.
        let oracle = evaluate(zeroed, &Dtype::F32.into(), &images, Evaluator::Runtime)?;
        let single = evaluate(own, &Dtype::F32.into(), &images, Evaluator::Runtime)?;
        assert_eq!(single.subnormals, [0, 0], "{what}");
        assert_eq!(single.logits, oracle.logits, "{what}: the same file but for the sign of a zero");
        let error = error_of(&engine, &oracle.logits)?;
        assert!(error <= TOLERANCE_F32, "{what}: the engine differs by {error:.1e}");

        let half = evaluate(own, &Dtype::F16.into(), &images, Evaluator::Runtime)?;
        let folded = own.folded()?;
        let is_kept = |w: &f32| f16::from_f32(*w).classify() == std::num::FpCategory::Subnormal;
        let expected = folded.weights.values().flat_map(|tensor| &tensor.data).filter(|w| is_kept(w)).count();
        assert!(expected > 0, "{what}: ordinary weights reach below the normal numbers of f16");
        assert_eq!(half.subnormals, [0, expected], "{what}");
        let error = error_of(&half.logits, &oracle.logits)?;
        assert!(error <= TOLERANCE_F16, "{what}: f16 differs by {error:.1e}");
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    ROWS.iter().map(|row| Trial::test(format!("subnormal/{}", row.name), move || run(row))).collect()
}
