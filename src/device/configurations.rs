//! Which configurations a GPU's launches use, and what is noted of them. Kernels, problems and configurations are names here; what they
//! mean is for [`crate::ops::config`] to say.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::Result;
use crate::dtype::Dtype;

/// A choice that launches have: how some kernels solve a problem in a precision.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Choice {
    /// The kernels, such as `pointwise_forward`.
    pub kernels: String,
    /// The type of activations.
    pub precision: Dtype,
    /// Everything that the problem says of itself.
    pub problem: String,
}

/// A choice that a launch had, and what was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What there was to choose.
    pub choice: Choice,
    /// The configuration that the launch used.
    pub taken: String,
    /// All that solve the problem.
    pub listed: Vec<String>,
}

/// `pointwise_forward=128x128-vector`.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.choice.kernels, self.taken)
    }
}

/// What is to be used in the place of what the engine would choose, and who watches.
#[derive(Debug, Default)]
pub struct Configurations {
    /// By name of the kernels, for all problems.
    forced: Mutex<BTreeMap<String, String>>,
    /// For single problems, as a tuner found them.
    tuned: Mutex<HashMap<Choice, String>>,
    /// Whether there is any of either: launches come by here.
    any: AtomicBool,
    /// How often either changed: recorded launches keep the configurations that they were recorded with.
    changes: AtomicU64,
    /// Decisions of launches, while somebody watches them.
    watched: Mutex<Option<Vec<Decision>>>,
}

impl Configurations {
    /// Makes launches of some kernels use the configuration of a name, or with `None` what they would use otherwise.
    pub(crate) fn force(&self, kernels: &str, name: Option<&str>) {
        let mut forced = lock(&self.forced);
        match name {
            Some(name) => drop(forced.insert(kernels.to_owned(), name.to_owned())),
            None => drop(forced.remove(kernels)),
        }
        drop(forced);
        self.count();
    }

    /// Makes launches that have this choice take the configuration of a name, unless one is forced, or with `None` the engine's.
    pub fn tune(&self, choice: Choice, name: Option<String>) {
        let mut tuned = lock(&self.tuned);
        match name {
            Some(name) => drop(tuned.insert(choice, name)),
            None => drop(tuned.remove(&choice)),
        }
        drop(tuned);
        self.count();
    }

    /// How many choices are tuned.
    pub fn tuned(&self) -> usize {
        lock(&self.tuned).len()
    }

    fn count(&self) {
        let any = !lock(&self.forced).is_empty() || !lock(&self.tuned).is_empty();
        self.any.store(any, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// How often configurations were forced or tuned so far.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Whether somebody watches decisions.
    pub(super) fn is_watched(&self) -> bool {
        lock(&self.watched).is_some()
    }

    /// The name of the configuration that a launch is to use; `None` where the engine chooses.
    pub(crate) fn named(&self, kernels: &str, choice: impl FnOnce() -> Choice) -> Option<String> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        let forced = lock(&self.forced).get(kernels).cloned();
        forced.or_else(|| lock(&self.tuned).get(&choice()).cloned())
    }

    /// Runs `work` and returns the decisions of its launches, in order and each once.
    ///
    /// # Errors
    /// What the work returns.
    pub fn watch(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<Decision>> {
        *lock(&self.watched) = Some(Vec::new());
        let outcome = work();
        let seen = lock(&self.watched).take().unwrap_or_default();
        outcome.map(|()| seen)
    }

    /// Notes the decision of a launch, where somebody watches.
    pub(crate) fn note(&self, decision: impl FnOnce() -> Decision) {
        if let Some(seen) = &mut *lock(&self.watched) {
            let decision = decision();
            if !seen.contains(&decision) {
                seen.push(decision);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
