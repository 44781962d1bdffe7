//! Methods side by side, from trials of methods × budgets × seeds: their spread, their difference to random masks, and how
//! much of what random masks differ by is due to the mask at all.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::curves::MetricsLine;
use super::html::{document, section};
use super::result::{NetworkStage, RunResult};
use super::scatter::{Mark, Scatter};
use super::table::{Align, Table, escape};
use super::text::MISSING;
use crate::measure::{Difference, deviation, mean, variance_share};

/// Version of the layout of [`TrialFile`]; it rises when a field changes its meaning or goes.
pub const TRIAL_SCHEMA: u32 = 1;
/// The method that others are compared with.
const RANDOM: &str = "random";

/// What a trial is of. Written, it is the name of its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialName {
    /// How blocks were chosen.
    pub method: String,
    /// What the merged network may take.
    pub budget: String,
    /// Seed of choice and finetuning.
    pub seed: u64,
    /// Which random mask; absent for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<u64>,
}

impl fmt::Display for TrialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, budget, seed, mask } = self;
        let mask = mask.map_or_else(String::new, |mask| format!("-{mask}"));
        write!(f, "{}-{method}{mask}-seed-{seed}", budget.replace([' ', '_'], "-"))
    }
}

/// A score during finetuning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// Steps of finetuning.
    pub step: u64,
    /// Accuracy on the test images, percent.
    pub top1: f64,
    /// Mean cross-entropy on the test images.
    pub loss: f64,
}

/// One finished trial: a row of `methods.csv`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number in the list of jobs.
    pub job: usize,
    /// What it is of.
    #[serde(flatten)]
    pub name: TrialName,
    /// Accuracy of the merged network on the test images, percent.
    pub top1: f64,
    /// Mean cross-entropy of it.
    pub loss: Option<f64>,
    /// Accuracy of the network that it was made from.
    pub original_top1: f64,
    /// Time by the latency table, as a share of the original's.
    pub latency_share: Option<f64>,
    /// Measured milliseconds of one pass; 0 where nothing was measured.
    pub latency_ms: f64,
    /// Measured images/s over those of the original.
    pub speed_up: Option<f64>,
    /// Multiply-accumulates per image.
    pub macs: u64,
    /// Largest difference of a logit to the unmerged network, relative to the logits' scale.
    pub merge_error: Option<f64>,
    /// Seconds that the choice of blocks took.
    pub search_seconds: f64,
    /// Seconds of finetuning.
    pub finetune_seconds: f64,
    /// One entry per block, 1 = its activations stayed.
    pub kept: Vec<u8>,
    /// Scores after the epochs of finetuning.
    pub recovery: Vec<RecoveryPoint>,
}

impl Trial {
    /// From what a run left.
    pub fn new(job: usize, name: TrialName, result: &RunResult, metrics: &[MetricsLine]) -> Self {
        let merged = result.network(NetworkStage::Merged);
        let seconds = |stage: &str| result.stages.iter().filter(|s| s.name == stage).map(|s| s.seconds).sum();
        let point = |line: &MetricsLine| {
            let finetuning = line.stage.as_deref() == Some("finetune");
            let (step, top1, loss) = (line.step?, line.test_top1?, line.test_loss?);
            finetuning.then_some(RecoveryPoint { step: step as u64, top1, loss })
        };
        let mut recovery: Vec<RecoveryPoint> = metrics.iter().filter_map(point).collect();
        // A step that was run twice, after a resume, counts as it was run last.
        recovery.reverse();
        recovery.sort_by_key(|point| point.step);
        recovery.dedup_by_key(|point| point.step);
        Self {
            job,
            name,
            top1: merged.map_or(f64::NAN, |network| network.top1),
            loss: merged.and_then(|network| network.loss),
            original_top1: result.network(NetworkStage::Original).map_or(f64::NAN, |network| network.top1),
            latency_share: result.latency_share,
            latency_ms: merged.map_or(0.0, |network| network.latency_ms.median),
            speed_up: result.speed_up(NetworkStage::Merged),
            macs: merged.map_or(0, |network| network.macs),
            merge_error: result.merge.as_ref().map(|merge| merge.max_rel_error),
            search_seconds: seconds("search"),
            finetune_seconds: seconds("finetune"),
            kept: result.kept.clone(),
            recovery,
        }
    }
}

/// Mean and standard deviation of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation; null of one value.
    pub deviation: Option<f64>,
}

impl Spread {
    fn of(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.flatten().collect();
        mean(&values).map(|mean| Self { mean, deviation: deviation(&values) })
    }
}

/// A method at a budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodSummary {
    /// What the merged networks may take.
    pub budget: String,
    /// How blocks were chosen.
    pub method: String,
    /// Finished trials.
    pub trials: usize,
    /// Accuracy, over seeds and, for random masks, over masks.
    pub top1: Option<Spread>,
    /// Test loss likewise.
    pub loss: Option<Spread>,
    /// Time by the latency table as a share of the original's.
    pub latency_share: Option<Spread>,
    /// Measured speed-up.
    pub speed_up: Option<Spread>,
    /// Accuracy over that of random masks with the same seed, points.
    pub top1_over_random: Option<Difference>,
    /// Test loss below that of random masks with the same seed.
    pub loss_under_random: Option<Difference>,
    /// Mean scores after the epochs of finetuning.
    pub recovery: Vec<RecoveryPoint>,
}

/// What random masks at a budget say of the experiment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BudgetSummary {
    /// What the merged networks may take.
    pub budget: String,
    /// Random masks that all seeds have.
    pub masks: usize,
    /// Seeds.
    pub seeds: usize,
    /// Share of the variance of the accuracy that is due to the mask; the rest is due to the seed.
    pub top1_mask_share: Option<f64>,
    /// The same of the test loss.
    pub loss_mask_share: Option<f64>,
}

/// `methods.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrialFile<'a> {
    /// [`TRIAL_SCHEMA`].
    pub schema: u32,
    /// Version of this program.
    pub version: &'static str,
    /// Jobs of the comparison, finished or not.
    pub jobs: usize,
    /// Methods by budget, in the order of the jobs.
    pub methods: Vec<MethodSummary>,
    /// Budgets.
    pub budgets: Vec<BudgetSummary>,
    /// The finished trials.
    pub trials: &'a [Trial],
}

impl<'a> TrialFile<'a> {
    /// Puts trials together, `jobs` being how many there will be.
    pub fn new(jobs: usize, trials: &'a [Trial]) -> Self {
        let budgets = distinct(trials.iter().map(|trial| trial.name.budget.as_str()));
        let groups: Vec<Group<'_>> = budgets.into_iter().map(|budget| Group::new(trials, budget)).collect();
        Self {
            schema: TRIAL_SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            jobs,
            methods: groups.iter().flat_map(Group::methods).collect(),
            budgets: groups.iter().map(Group::summary).collect(),
            trials,
        }
    }

    /// One row for each method and budget.
    pub fn table(&self) -> Table {
        use Align::{Left, Right};
        let mut header = vec![("budget", Left), ("method", Left)];
        header.extend(["trials", "top-1 %", "±", "loss", "±", "time %", "×"].map(|name| (name, Right)));
        header.extend(["over random", "95 %", "better"].map(|name| (name, Right)));
        let mut table = Table::new(&header);
        for row in &self.methods {
            let number = |value: Option<f64>, digits| {
                value.map_or_else(|| MISSING.to_owned(), |value| format!("{value:.digits$}"))
            };
            let middle = |spread: Option<Spread>, digits| number(spread.map(|spread| spread.mean), digits);
            let around = |spread: Option<Spread>, digits| number(spread.and_then(|spread| spread.deviation), digits);
            let share = row.latency_share.map(|share| Spread { mean: 100.0 * share.mean, ..share });
            let mut cells = vec![row.budget.clone(), row.method.clone(), row.trials.to_string()];
            cells.extend([middle(row.top1, 2), around(row.top1, 2), middle(row.loss, 4), around(row.loss, 4)]);
            cells.extend([middle(share, 1), middle(row.speed_up, 2)]);
            cells.extend(match row.top1_over_random {
                None => [MISSING; 3].map(str::to_owned),
                Some(difference) => [
                    format!("{:+.2}", difference.mean),
                    difference
                        .interval
                        .map_or_else(|| MISSING.to_owned(), |(low, high)| format!("{low:+.2} to {high:+.2}")),
                    format!("{} of {}", difference.better, difference.pairs),
                ],
            });
            table.row(&cells);
        }
        table
    }

    /// What is to be said beside the table.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = vec![format!("{} of {} jobs are finished", self.trials.len(), self.jobs)];
        for budget in &self.budgets {
            let share = |share: Option<f64>| share.map_or_else(|| MISSING.to_owned(), |share| format!("{share:.2}"));
            if budget.masks > 0 {
                notes.push(format!(
                    "{}: of what {} random masks × {} seeds differ by, the mask makes {} of the variance of top-1 and {} \
                     of that of the loss",
                    budget.budget,
                    budget.masks,
                    budget.seeds,
                    share(budget.top1_mask_share),
                    share(budget.loss_mask_share)
                ));
            }
        }
        notes
    }

    /// `methods.html`: the table, the notes, and accuracy over time.
    pub fn page(&self) -> String {
        let title = "Methods side by side";
        let notes: String = self.notes().iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
        let head = format!("<h1>{title}</h1>\n{notes}<div class=\"scroll\">{}</div>", self.table().html());
        let mark = |row: &MethodSummary| {
            let class = if row.method == RANDOM { "c-kept" } else { "c-merged" };
            Some(Mark { name: row.method.clone(), at: (100.0 * row.latency_share?.mean, row.top1?.mean), class })
        };
        let marks = self.methods.iter().filter_map(mark).collect();
        let labels = ("time of the merged network by the latency table, % of the original's", "top-1 %, mean");
        let plot = Scatter { title: "Accuracy over time", labels, marks }.svg();
        document(title, &format!("{head}\n{}", section("Accuracy over time", &plot)))
    }
}

/// The trials at one budget.
struct Group<'a> {
    budget: &'a str,
    trials: Vec<&'a Trial>,
    seeds: Vec<u64>,
    masks: Vec<u64>,
}

impl<'a> Group<'a> {
    fn new(trials: &'a [Trial], budget: &'a str) -> Self {
        let trials: Vec<&Trial> = trials.iter().filter(|trial| trial.name.budget == budget).collect();
        let seeds: BTreeSet<u64> = trials.iter().map(|trial| trial.name.seed).collect();
        let masks: BTreeSet<u64> = trials.iter().filter_map(|trial| trial.name.mask).collect();
        Self { budget, trials, seeds: seeds.into_iter().collect(), masks: masks.into_iter().collect() }
    }

    /// A number of a method's trials, by seed.
    fn by_seed(&self, method: &str, mask: Option<u64>, of: fn(&Trial) -> Option<f64>) -> Vec<Option<f64>> {
        let is = |trial: &&&Trial, seed: u64| {
            trial.name.method == method && trial.name.mask == mask && trial.name.seed == seed
        };
        self.seeds.iter().map(|&seed| self.trials.iter().find(|trial| is(trial, seed)).and_then(|t| of(t))).collect()
    }

    /// The same of every random mask.
    fn random(&self, of: fn(&Trial) -> Option<f64>) -> Vec<Vec<Option<f64>>> {
        self.masks.iter().map(|&mask| self.by_seed(RANDOM, Some(mask), of)).collect()
    }

    fn over_random(&self, method: &str, of: fn(&Trial) -> Option<f64>) -> Option<Difference> {
        Difference::of(&self.by_seed(method, None, of), &self.random(of)).filter(|_| method != RANDOM)
    }

    fn methods(&self) -> Vec<MethodSummary> {
        let summary = |method: &str| {
            let own: Vec<&Trial> = self.trials.iter().copied().filter(|trial| trial.name.method == method).collect();
            let spread = |of: fn(&Trial) -> Option<f64>| Spread::of(own.iter().map(|trial| of(trial)));
            MethodSummary {
                budget: self.budget.to_owned(),
                method: method.to_owned(),
                trials: own.len(),
                top1: spread(|trial| Some(trial.top1)),
                loss: spread(|trial| trial.loss),
                latency_share: spread(|trial| trial.latency_share),
                speed_up: spread(|trial| trial.speed_up),
                top1_over_random: self.over_random(method, |trial| Some(trial.top1)),
                loss_under_random: self.over_random(method, |trial| trial.loss.map(|loss| -loss)),
                recovery: recovery(&own),
            }
        };
        distinct(self.trials.iter().map(|trial| trial.name.method.as_str())).into_iter().map(summary).collect()
    }

    fn summary(&self) -> BudgetSummary {
        let complete = |of: fn(&Trial) -> Option<f64>| -> Vec<Vec<f64>> {
            self.random(of).into_iter().filter_map(|row| row.into_iter().collect()).collect()
        };
        let (top1, loss) = (complete(|trial| Some(trial.top1)), complete(|trial| trial.loss));
        BudgetSummary {
            budget: self.budget.to_owned(),
            masks: top1.len(),
            seeds: self.seeds.len(),
            top1_mask_share: variance_share(&top1),
            loss_mask_share: variance_share(&loss),
        }
    }
}

/// Mean scores at the steps that all trials have.
fn recovery(trials: &[&Trial]) -> Vec<RecoveryPoint> {
    let Some((first, others)) = trials.split_first() else { return Vec::new() };
    let at = |trial: &Trial, step: u64| trial.recovery.iter().find(|point| point.step == step).copied();
    let point = |step: u64| {
        let points: Vec<RecoveryPoint> = trials.iter().filter_map(|trial| at(trial, step)).collect();
        let over = points.len() as f64;
        let sum = |of: fn(&RecoveryPoint) -> f64| points.iter().map(of).sum::<f64>() / over;
        RecoveryPoint { step, top1: sum(|point| point.top1), loss: sum(|point| point.loss) }
    };
    let common = |point: &&RecoveryPoint| others.iter().all(|trial| at(trial, point.step).is_some());
    first.recovery.iter().filter(common).map(|shared| point(shared.step)).collect()
}

/// Every value once, in the order of their first places.
fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}
