# The pages that people read.


rule make_report:
    input:
        parents("report"),
    output:
        RESULTS / "report" / RUN.plan.config.name / "done/report.{id}.json",
    log:
        RESULTS / "report" / RUN.plan.config.name / "logs/report.{id}.log",
    benchmark:
        RESULTS / "report" / RUN.plan.config.name / "logs/report.{id}.tsv"
    threads: 1
    message:
        "Report"
    script:
        "../scripts/stage.py"
