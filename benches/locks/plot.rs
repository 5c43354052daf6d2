//! The drawings: plain SVG, 700 pixels wide, to be read in a README.

use std::path::Path;

use plotters::coord::combinators::{BindKeyPoints, IntoLogRange, LogCoord, WithKeyPoints};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (700, 400);
const BLUE: RGBColor = RGBColor(0, 90, 160);
const ORANGE: RGBColor = RGBColor(200, 80, 0);
const GREY: RGBColor = RGBColor(175, 175, 175);
const DARK: RGBColor = RGBColor(70, 70, 70);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// In units of the SVG writer, which makes 16 of them 13 pixels.
const CAPTION_SIZE: u32 = 21;
const TEXT_SIZE: u32 = 16;
const LABEL_SIZE: u32 = 17;
/// Labels are at least as far apart as they are high.
const LABEL_HEIGHT: i32 = 18;

type Line = (&'static str, Vec<(f64, f64)>);

/// B6: p50 of a cycle by second, a line for each shape, the library's first.
pub fn long_transaction(path: &Path, seconds: f64, lines: &[Line; 3]) {
    let all = || lines.iter().flat_map(|(_, points)| points.iter().map(|(_, p50)| *p50));
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let below = root
        .titled("One lock and unlock, while another session keeps a transaction open", ("sans-serif", CAPTION_SIZE))
        .unwrap();
    let mut chart = ChartBuilder::on(&below)
        .margin(14)
        .margin_right(180)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..seconds, logarithmic(least * 0.7, most * 1.4))
        .unwrap();
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", TEXT_SIZE))
        .x_desc("seconds since the transaction began")
        .y_desc("p50, ms (logarithmic)")
        .x_label_formatter(&|x| x.to_string())
        .y_label_formatter(&|y| y.to_string())
        .draw()
        .unwrap();
    let mut labels = Vec::new();
    for ((name, points), color) in lines.iter().zip([BLUE, ORANGE, DARK]) {
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2))).unwrap();
        if let Some(end) = points.last() {
            let (x, y) = chart.backend_coord(end);
            labels.push((y, x + 8, *name, color));
        }
    }
    labels.sort_by_key(|label| label.0);
    // Upwards from the lowest, so that none is pushed below the axis.
    let mut lowest = i32::MAX;
    for (y, x, name, color) in labels.into_iter().rev() {
        lowest = y.min(lowest.saturating_sub(LABEL_HEIGHT));
        label(&root, name, (x, lowest), &color);
    }
    root.present().expect("write a plot");
}

/// B3: the share of hand-overs that took up to so long, a line for each kind, all of them first.
pub fn hand_over(path: &Path, lines: &[Line; 3]) {
    let all = || lines.iter().flat_map(|(_, points)| points.iter().map(|(ms, _)| *ms));
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let below = root
        .titled(
            "From release to acquire: eight processes with two threads each, one lock",
            ("sans-serif", CAPTION_SIZE),
        )
        .unwrap();
    let mut chart = ChartBuilder::on(&below)
        .margin(14)
        .margin_right(180)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(logarithmic(least * 0.8, most * 1.2), 0.0..100.0)
        .unwrap();
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", TEXT_SIZE))
        .x_desc("time from release to acquire, ms (logarithmic)")
        .y_desc("share of hand-overs, %")
        .x_label_formatter(&|x| x.to_string())
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()
        .unwrap();
    let (right, top) = chart.backend_coord(&(most * 1.2, 100.0));
    for (((name, points), (color, width)), row) in lines.iter().zip([(GREY, 5), (ORANGE, 2), (BLUE, 2)]).zip(0..) {
        let percent = points.iter().map(|(ms, share)| (*ms, share * 100.0));
        chart.draw_series(LineSeries::new(percent, color.stroke_width(width))).unwrap();
        // The lines may cross and coincide, so the names are beside them and not at them.
        let (x, y) = (right + 14, top + 30 + row * (LABEL_HEIGHT + 4));
        root.draw(&PathElement::new([(x, y), (x + 22, y)], color.stroke_width(width))).unwrap();
        label(&root, name, (x + 28, y), &DARK);
    }
    root.present().expect("write a plot");
}

/// Text whose left end is in the middle of its height at a place.
fn label<B: DrawingBackend>(root: &DrawingArea<B, plotters::coord::Shift>, text: &str, at: (i32, i32), color: &RGBColor)
where
    B::ErrorType: 'static,
{
    let style = ("sans-serif", LABEL_SIZE).into_font().color(color).pos(Pos::new(HPos::Left, VPos::Center));
    root.draw(&Text::new(text, at, style)).unwrap();
}

/// A logarithmic axis, marked at 1, 2 and 5 in every decade.
fn logarithmic(from: f64, to: f64) -> WithKeyPoints<LogCoord<f64>> {
    let decades = [0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0];
    let marks = decades.iter().flat_map(|decade| [1.0, 2.0, 5.0].map(|n| n * decade));
    (from..to).log_scale().with_key_points(marks.filter(|mark| (from..=to).contains(mark)).collect())
}
