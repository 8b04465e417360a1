# For each stage of the registry the word that people ask for, and the rule that does one of its jobs. A job is finished
# when its manifest exists. The run's pool of workers does the work: a job itself is one thread.


rule report:
    input:
        RUN.targets("report"),
        # What `snakemake --report` shows; none before there is a report.
        figures(),
    localrule: True


for stage in RUN.stages:
    if stage.name != "report":

        rule:
            name:
                stage.name
            input:
                RUN.targets(stage.name),
            localrule: True


for stage in RUN.stages:

    rule:
        name:
            f"make_{stage.name}"
        input:
            parents(stage.name),
        output:
            RUN.path(stage, "done", "json"),
        log:
            RUN.path(stage, "logs", "log"),
        priority: stage.priority
        threads: 1
        resources:
            mem_mb=memory(stage.name),
        message:
            stage.says
        shell:
            RUN.command
