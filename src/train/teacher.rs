//! Knowledge distillation: the student follows a teacher that sees the same images.

use crate::data::Batch;
use crate::device::{Buffer, Device, View, ViewMut};
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{Graph, NodeId};
use crate::model::Model;
use crate::ops::loss::{LossSum, SoftTarget, distillation, feature_mse};
use crate::{Error, Result};

/// What a student is to follow (`methods.md` 1.3).
#[derive(Debug, Clone, PartialEq)]
pub struct Distillation {
    /// The teacher; it takes the student's images and has its classes.
    pub teacher: Model,
    /// Weight α of the teacher's logits; the labels have 1 − α.
    pub alpha: f32,
    /// Temperature T.
    pub temperature: f32,
    /// Weight of the feature loss; 0 turns it off.
    pub feature_weight: f32,
    /// Values compared by the feature loss: the student's node and the teacher's.
    pub feature_pairs: Vec<(NodeId, NodeId)>,
}

/// A distillation ready to run.
pub(super) struct Teacher<'a> {
    settings: &'a Distillation,
    engine: Engine,
    pairs: Vec<(NodeId, NodeId)>,
}

/// Gradients of tapped values of the student.
type FeatureGradients = Vec<(NodeId, Vec<f32>)>;

impl<'a> Teacher<'a> {
    pub fn new(device: &Device, settings: &'a Distillation, student: &Graph, batch: usize) -> Result<Self> {
        let teacher = &settings.teacher.graph;
        let Distillation { alpha, temperature, feature_weight, .. } = *settings;
        let settings_fit = (0.0..=1.0).contains(&alpha)
            && temperature > 0.0
            && temperature.is_finite()
            && feature_weight >= 0.0
            && feature_weight.is_finite();
        if !settings_fit {
            return Err(Error::Config(format!(
                "distillation: alpha {alpha} must lie in 0..=1, temperature {temperature} above 0, feature weight \
                 {feature_weight} at 0 or above"
            )));
        }
        if (teacher.input_shape(), teacher.classes()) != (student.input_shape(), student.classes()) {
            let describe = |g: &Graph| format!("{} images and {} classes", g.input_shape(), g.classes());
            return Err(Error::shape("teacher", describe(student), describe(teacher)));
        }
        let pairs = if feature_weight > 0.0 { settings.feature_pairs.clone() } else { Vec::new() };
        check_pairs(&pairs, student, teacher)?;
        let mut taps: Vec<NodeId> = pairs.iter().map(|pair| pair.1).collect();
        taps.sort_unstable();
        taps.dedup();
        let options = EngineOptions { batch, fusion: Fusion::Fused, training: false, taps };
        Ok(Self { settings, engine: Engine::new(device, &settings.teacher, &options)?, pairs })
    }

    /// The student's values that must stay readable.
    pub fn student_taps(&self) -> Vec<NodeId> {
        self.pairs.iter().map(|pair| pair.0).collect()
    }

    /// Runs teacher and student on a batch. Fills `d_logits` and returns the loss (features included, as a sum over the
    /// images) and the gradients of the student's tapped values.
    pub fn loss(
        &mut self,
        student: &mut Engine,
        batch: &Batch,
        scale: f32,
        d_logits: &mut Buffer,
    ) -> Result<(LossSum, FeatureGradients)> {
        let classes = student.graph().classes();
        let len = batch.labels.len() * classes;
        let teacher = self.engine.forward(&batch.images)?.view(0..len);
        let Distillation { alpha, temperature, feature_weight, .. } = *self.settings;
        let logits = student.forward(&batch.images)?.view(0..len);
        let target = SoftTarget { teacher, alpha, temperature };
        let mut sum = distillation(logits, target, &batch.labels, classes, scale, d_logits.view_mut(0..len))?;
        let mut gradients = FeatureGradients::new();
        for &(own, teachers) in &self.pairs {
            let (own_value, teachers_value) = (student.tap(own)?, self.engine.tap(teachers)?);
            let mut gradient = vec![0.0; own_value.len()];
            let d = ViewMut::Host(&mut gradient);
            let loss = feature_mse(View::Host(&own_value), View::Host(&teachers_value), feature_weight, scale, d)?;
            sum.loss += loss * batch.labels.len() as f64;
            gradients.push((own, gradient));
        }
        Ok((sum, gradients))
    }
}

/// Each student's value at most once, both of one shape.
fn check_pairs(pairs: &[(NodeId, NodeId)], student: &Graph, teacher: &Graph) -> Result<()> {
    let (own, teachers) = (student.shapes()?, teacher.shapes()?);
    let mut seen = std::collections::HashSet::new();
    for &(s, t) in pairs {
        match (own.get(s), teachers.get(t)) {
            (Some(a), Some(b)) if a == b && seen.insert(s) => {}
            (a, b) => {
                let got = format!("student's node {s} {a:?}, teacher's node {t} {b:?}");
                return Err(Error::shape("feature distillation", "equal shapes, each student's node once", got));
            }
        }
    }
    Ok(())
}
