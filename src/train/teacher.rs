//! Knowledge distillation: the student follows a teacher that sees the same images.

use crate::device::{Buffer, Device, View};
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{Graph, NodeId};
use crate::model::Model;
use crate::ops::loss::{Gradient, LossRecord, SoftTarget, distillation, feature_mse};
use crate::{Error, Result};

/// The teacher that a student follows (`docs/methods.md` 1.3).
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
        let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps };
        Ok(Self { settings, engine: Engine::new(device, &settings.teacher, &options)?, pairs })
    }

    /// The student's values that must stay readable.
    pub fn student_taps(&self) -> Vec<NodeId> {
        self.pairs.iter().map(|pair| pair.0).collect()
    }

    /// Runs teacher and student on the student's images. Writes `d_logits`, adds the losses, features included, to the
    /// record, and writes the gradients of the student's tapped values. `scale` is the loss scale `[1]`.
    pub fn loss(
        &mut self,
        student: &mut Engine,
        record: &mut LossRecord,
        scale: Option<View<'_>>,
        d_logits: &mut Buffer,
    ) -> Result<()> {
        let len = record.images() * student.graph().classes();
        self.engine.set_images(student.images())?;
        let teacher = self.engine.run()?.view(0..len);
        let Distillation { alpha, temperature, feature_weight, .. } = *self.settings;
        let logits = student.run()?.view(0..len);
        let target = SoftTarget { teacher, alpha, temperature };
        distillation(record, logits, target, Gradient { to: d_logits.view_mut(0..len), scale })?;
        for &(own, teachers) in &self.pairs {
            let teacher = self.engine.tap(teachers)?;
            student.give_gradient(own, |student, to| {
                feature_mse(record, student, teacher, feature_weight, Gradient { to, scale })
            })?;
        }
        Ok(())
    }
}

/// Each student's value at most once, both of one shape.
fn check_pairs(pairs: &[(NodeId, NodeId)], student: &Graph, teacher: &Graph) -> Result<()> {
    let (own, teachers) = (student.shapes()?, teacher.shapes()?);
    let mut seen = std::collections::HashSet::new();
    for &(s, t) in pairs {
        match (own.get(s.index()), teachers.get(t.index())) {
            (Some(a), Some(b)) if a == b && seen.insert(s) => {}
            (a, b) => {
                let got = format!("student's node {s} {a:?}, teacher's node {t} {b:?}");
                return Err(Error::shape("feature distillation", "equal shapes, each student's node once", got));
            }
        }
    }
    Ok(())
}
