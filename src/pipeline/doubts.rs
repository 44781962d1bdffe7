//! Why a run may mean less than it seems to, though nothing stops it: the one place for what is a warning, or with
//! `--strict` an error.

use crate::data::{ClassMatch, Dataset};
use crate::graph::{Graph, Op};
use crate::train::TrainConfig;
use crate::{Error, Result};

/// Names that are told of a list before the rest is only counted.
const MAX_NAMES: usize = 4;

/// What is to be doubted about a run, one line each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Doubts(Vec<String>);

impl Doubts {
    /// Warns of each doubt, or refuses the run.
    ///
    /// # Errors
    /// With `strict` one [`Error::Doubt`] that names them all.
    pub fn settle(&self, strict: bool) -> Result<()> {
        if strict && !self.0.is_empty() {
            return Err(Error::Doubt(self.0.join("; ")));
        }
        self.0.iter().for_each(|doubt| tracing::warn!("{doubt}"));
        Ok(())
    }

    /// These and others.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Classes of a data set called `set`, with the names `data`, that a model with the names `model` does not know.
    pub(super) fn of_names(set: &str, data: &[String], model: &[String], matched: &ClassMatch) -> Self {
        if matched.unknown.is_empty() {
            return Self::default();
        }
        let unknown: Vec<&str> = matched.unknown.iter().map(|class| data[*class].as_str()).collect();
        let instead: Vec<&str> =
            matched.unknown.iter().map(|class| model[matched.places[*class] as usize].as_str()).collect();
        Self(vec![format!(
            "the model does not know {} of the {} classes of {set}: {}, which {} in the place of {}; what it makes of them \
             means nothing before it is finetuned on them: give the data that it was trained on",
            unknown.len(),
            data.len(),
            listed(&unknown),
            if unknown.len() == 1 { "is" } else { "are" },
            listed(&instead)
        )])
    }

    /// A teacher whose classes have other names, or another order, than those of the network that it teaches.
    pub fn of_teacher(own: &[String], teacher: &[String]) -> Self {
        let matched = ClassMatch::new(own, teacher);
        let moved = matched.places.iter().enumerate().find(|(class, place)| *class != **place as usize);
        match matched.unknown.first().copied().or(moved.map(|(class, _)| class)) {
            Some(class) => Self(vec![format!(
                "the teacher's class {class} is `{}`, that of the network it teaches is `{}`: it teaches other classes; \
                 give a teacher of the same data",
                teacher[class], own[class]
            )]),
            None => Self::default(),
        }
    }

    /// Images that can show nothing: of one class alone, or of classes that are never trained. `train` are the images of
    /// the training, where there is one.
    pub(super) fn of_images(train: Option<&Dataset>, test: &Dataset) -> Self {
        let (name, classes) = (test.name(), test.class_names());
        if let [class] = classes {
            return Self(vec![format!(
                "{name} has one class, `{class}`, so that every network is always right; add pictures of what is not `{class}`"
            )]);
        }
        let sets = train.iter().map(|train| (*train, "training")).chain([(test, "test")]);
        let mut doubts: Vec<String> = sets.filter_map(|(set, kind)| one_class(set, kind)).collect();
        let trained = train.map(images_per_class).filter(|_| doubts.is_empty());
        if let Some(trained) = trained {
            let tested = images_per_class(test);
            let untrained = (0..classes.len()).filter(|class| trained[*class] == 0 && tested[*class] > 0);
            let untrained: Vec<&str> = untrained.map(|class| classes[class].as_str()).collect();
            if !untrained.is_empty() {
                doubts.push(format!(
                    "{} of the {} classes of {name} have test images but no training images and cannot be learnt: {}; give \
                     more training images",
                    untrained.len(),
                    classes.len(),
                    listed(&untrained)
                ));
            }
        }
        Self(doubts)
    }

    /// Batch-norms that a stage called `name` would train over one value per channel: what they give is their bias, whatever
    /// the image.
    ///
    /// # Errors
    /// A malformed graph.
    pub(super) fn of_batch(name: &str, stage: &TrainConfig, graph: &Graph) -> Result<Self> {
        let shapes = graph.shapes()?;
        let nodes = graph.nodes.iter().zip(&shapes);
        let single: Vec<&str> = nodes
            .filter(|(node, shape)| matches!(node.op, Op::BatchNorm(_)) && shape.pixels() * stage.batch == 1)
            .map(|(node, _)| node.name.as_str())
            .collect();
        Ok(Self(if single.is_empty() {
            Vec::new()
        } else {
            vec![format!(
                "{name}: with batch 1, {} batch-norms have one value per channel to normalise, which leaves nothing of the \
                 image: {}; give --batch 2 or more, or larger images",
                single.len(),
                listed(&single)
            )]
        }))
    }
}

fn images_per_class(set: &Dataset) -> Vec<usize> {
    let mut images = vec![0; set.classes()];
    set.labels().iter().for_each(|label| images[*label as usize] += 1);
    images
}

fn one_class(set: &Dataset, kind: &str) -> Option<String> {
    let first = *set.labels().first()?;
    set.labels().iter().all(|label| *label == first).then(|| {
        format!(
            "all {kind} images of {} that are used, {}, are of the class `{}`, which says nothing about the other {}; give \
             {kind} images of all classes",
            set.name(),
            set.len(),
            set.class_names()[first as usize],
            set.classes() - 1
        )
    })
}

/// The first names of a list, and how many more there are.
fn listed(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(MAX_NAMES).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(MAX_NAMES) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
