//! Figures with their goals, and the tables of them.

use std::fmt;

use crate::context::Context;
use crate::measure::{Spread, digits};

/// What a benchmark has to say.
#[derive(Default)]
pub struct Section {
    pub figures: Vec<Figure>,
    /// Printed below the table.
    pub notes: Vec<String>,
    /// Something that may never happen, whatever the speed.
    pub wrong: Option<String>,
}

/// One row of a table.
pub struct Figure {
    pub measure: String,
    pub this_run: String,
    pub yardstick: String,
    pub ratio: Option<Spread>,
    pub goal: Option<Goal>,
}

/// What must be reached and what is aimed for, and what there is to judge by it.
pub struct Goal {
    value: f64,
    bound: Bound,
    unit: &'static str,
    must: f64,
    aim: Option<f64>,
}

#[derive(Clone, Copy)]
enum Bound {
    AtMost,
    AtLeast,
}

impl Figure {
    pub fn new(measure: impl Into<String>, this_run: impl fmt::Display) -> Figure {
        Figure {
            measure: measure.into(),
            this_run: this_run.to_string(),
            yardstick: String::new(),
            ratio: None,
            goal: None,
        }
    }

    pub fn yardstick(mut self, yardstick: impl fmt::Display) -> Figure {
        self.yardstick = yardstick.to_string();
        self
    }

    pub fn ratio(mut self, ratio: Spread) -> Figure {
        self.ratio = Some(ratio);
        self
    }

    /// Judges the ratio.
    pub fn ratio_at_most(self, ratio: Spread, must: f64, aim: impl Into<Option<f64>>) -> Figure {
        self.ratio(ratio).judged(ratio.median, Bound::AtMost, " ×", must, aim.into())
    }

    /// Judges the ratio.
    pub fn ratio_at_least(self, ratio: Spread, must: f64, aim: impl Into<Option<f64>>) -> Figure {
        self.ratio(ratio).judged(ratio.median, Bound::AtLeast, " ×", must, aim.into())
    }

    /// Judges a value of its own; `unit` comes after the figures of the goal.
    pub fn at_most(self, value: f64, unit: &'static str, must: f64, aim: impl Into<Option<f64>>) -> Figure {
        self.judged(value, Bound::AtMost, unit, must, aim.into())
    }

    fn judged(mut self, value: f64, bound: Bound, unit: &'static str, must: f64, aim: Option<f64>) -> Figure {
        self.goal = Some(Goal { value, bound, unit, must, aim });
        self
    }

    /// What comes after the measure.
    fn cells(&self) -> [String; 6] {
        let ratio = self.ratio.map(|ratio| ratio.to_string()).unwrap_or_default();
        let [must, aim, verdict] = self.goal.as_ref().map(Goal::cells).unwrap_or_default();
        [self.this_run.clone(), self.yardstick.clone(), ratio, must, aim, verdict]
    }
}

impl Goal {
    fn is_within(&self, limit: f64) -> bool {
        match self.bound {
            Bound::AtMost => self.value <= limit,
            Bound::AtLeast => self.value >= limit,
        }
    }

    fn cells(&self) -> [String; 3] {
        let sign = match self.bound {
            Bound::AtMost => '≤',
            Bound::AtLeast => '≥',
        };
        let text = |limit: f64| format!("{sign} {limit}{}", self.unit);
        let verdict = match self.aim {
            _ if !self.is_within(self.must) => "missed",
            Some(aim) if self.is_within(aim) => "aim reached",
            _ => "reached",
        };
        [text(self.must), self.aim.map(text).unwrap_or_default(), verdict.to_owned()]
    }
}

const HEADER: [&str; 6] = ["this run", "yardstick", "ratio", "must reach", "aim for", "verdict"];

/// Prints a table; each figure may have its benchmark's id in front.
pub fn print<'a>(figures: impl Iterator<Item = (Option<&'static str>, &'a Figure)>) {
    let with_header = |first: String, rest: [String; 6]| std::iter::once(first).chain(rest).collect::<Vec<_>>();
    let mut rows = vec![with_header("measure".to_owned(), HEADER.map(str::to_owned))];
    rows.extend(figures.map(|(id, figure)| {
        let id = id.map(|id| format!("{id} ")).unwrap_or_default();
        with_header(format!("{id}{}", figure.measure), figure.cells())
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("  {}", cells.join("  ").trim_end());
    }
}

/// Writes `summary.csv`: every figure, and the machine that they are of.
pub fn write_summary(context: &Context, figures: &[(&'static str, Figure)]) {
    let header = [
        "benchmark",
        "measure",
        "this_run",
        "yardstick",
        "ratio",
        "ratio_least",
        "ratio_most",
        "must_reach",
        "aim_for",
        "verdict",
        "run",
        "cores",
        "server_version",
    ];
    let rows = figures.iter().map(|(id, figure)| {
        let [this_run, yardstick, _, must, aim, verdict] = figure.cells();
        let of_ratio = |part: fn(Spread) -> f64| figure.ratio.map(part).map(digits).unwrap_or_default();
        vec![
            (*id).to_owned(),
            figure.measure.clone(),
            this_run,
            yardstick,
            of_ratio(|ratio| ratio.median),
            of_ratio(|ratio| ratio.least),
            of_ratio(|ratio| ratio.most),
            must,
            aim,
            verdict,
            context.pick("full", "short").to_owned(),
            context.cores.to_string(),
            context.server_version.clone(),
        ]
    });
    context.write_csv("summary.csv", &header, rows);
}
